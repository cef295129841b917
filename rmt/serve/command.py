"""`rmt serve`: options, the bank, and the process from its start to the end of its last answer."""

import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from ..bank import TaskBank
    from .service import Service

NEEDED = {"fastapi": "fastapi", "uvicorn": "uvicorn", "python_multipart": "python-multipart"}
# Pillow refuses more by itself.
MOST_PIXELS = 178_000_000


def options(parser: "ArgumentParser") -> None:
    """Of serve."""
    add = parser.add_argument
    add("tasks", type=str, nargs="+", metavar="TASKS", help="task folder, run folder, or a folder of them")
    add("--port", type=int, default=8080, help="to listen on; 0 is any that is free")
    add("--host", type=str, default="127.0.0.1", help="address to listen on; there is no authentication")
    add("--model", type=str, help="base model, as for rmt train (default: as the tasks name it)")
    add("--pretrained", type=str, help="its weights: a tag or a file")
    add("--device", type=str, default="auto", help="auto, cpu, cuda, cuda:1")
    add("--precision", type=str, choices=("fp32", "bf16"), default="fp32", help="bf16 rounds the model, for speed")
    add("--max-batch", type=int, default=32, help="rows (image, task) of one forward")
    add("--max-wait-ms", type=float, default=2.0, help="how long a row waits for others while the model is free")
    add("--queue", type=int, default=256, help="rows under way at most; what comes then gets 429 and Retry-After")
    add("--max-image-bytes", type=int, default=10 << 20, help="of one image")
    add("--max-pixels", type=int, default=25_000_000, help="of one image")
    add("--decoders", type=int, default=2, help="threads that decode images")
    add("--invariant", action="store_true", help="answers do not depend on the batch, bit for bit")
    add("--base-classes", type=str, nargs="+", help="classes of __base__, the model without a mask")
    add("--template", type=str, default="a photo of a {}.", help="text of --base-classes, with one {}")
    add("--allow-hub", action="store_true", help="let requests load tasks from the hub by id")
    add("--read-only", action="store_true", help="let no request load or remove tasks")
    add("--grace", type=float, default=30.0, help="seconds after SIGTERM until what is unanswered is given up")


def need_extra() -> None:
    """Raises UserError where the extra `serve` is not installed."""
    if missing := [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]:
        raise UserError(f"rmt serve needs {', '.join(missing)}: pip install 'rmt[serve]'")


def discover(arguments: list[str]) -> tuple[dict[str, Path], tuple[Path, ...]]:
    """({name: task folder}, the folders below which more may be loaded). Raises UserError: none, or two of a name."""
    from ..checkpoint import MASK_FILE
    from ..evaluate import task_path
    from .service import default_name

    found: dict[str, Path] = {}
    for argument in arguments:
        inside = [task_path(path) for path in [Path(argument), *_children(Path(argument))]]
        folders = [path for path in inside if (path / MASK_FILE).is_file()]
        if not folders:
            raise UserError(f"expected a task folder, a run folder, or a folder of them, got {argument!r}")
        # A run folder's other folders are no tasks of their own.
        for folder in folders[:1] if folders[0] == inside[0] else folders:
            name = default_name(folder.resolve())
            if name in found and found[name].resolve() != folder.resolve():
                raise UserError(f"tasks must have different names, got {name!r} twice: {found[name]} and {folder}")
            found[name] = folder
    return found, tuple(Path(argument).resolve() for argument in arguments)


def _children(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _check(args: "Namespace") -> None:
    least = {"max_batch": 1, "queue": 1, "max_image_bytes": 1, "max_pixels": 1, "decoders": 1, "max_wait_ms": 0,
             "grace": 0, "port": 0}  # fmt: skip
    for name, low in least.items():
        if not getattr(args, name) >= low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, got {getattr(args, name)}")
    if args.max_pixels > MOST_PIXELS:
        raise UserError(f"--max-pixels must be at most {MOST_PIXELS}, got {args.max_pixels}")
    if args.port > 65535:
        raise UserError(f"--port must be at most 65535, got {args.port}")


def serve(args: "Namespace") -> int:
    """Serves until a signal. Returns 0, or 1 where --grace was over before the last answer. Raises UserError."""
    need_extra()
    _check(args)
    tasks, roots = discover(args.tasks)
    bank = _bank(args, tasks)
    if args.base_classes:
        bank.set_classes(args.base_classes, args.template)
    from .images import Limits
    from .service import Options, Service

    wanted = Options(
        args.max_batch, args.max_wait_ms, args.queue, Limits(args.max_image_bytes, args.max_pixels), args.decoders,
        roots, args.allow_hub, args.read_only,
    )  # fmt: skip
    print(f"tasks      {len(bank.tasks)}: {', '.join(bank.tasks)}", flush=True)
    return run(Service(bank, wanted, args.base_classes, bank.logit_scale.device), args.host, args.port, args.grace)


def _bank(args: "Namespace", tasks: dict[str, Path]) -> "TaskBank":
    """Over the model that --model names, or all tasks."""
    from ..bank import load
    from ..checkpoint import load_task

    found = {name: load_task(path) for name, path in tasks.items()}
    named = {(task.model, task.pretrained, task.config.get("image_size")) for task in found.values()}
    model, pretrained, size = named.pop() if len(named) == 1 else (None, None, None)
    if args.model is None and model is None:
        names = sorted({str(task.model) for task in found.values()})
        raise UserError(f"--model must be given: the tasks do not name one base model, but {', '.join(names)}")
    if args.model is not None:
        model, pretrained = args.model, args.pretrained
    bank = load(model, pretrained, image_size=size, device=args.device, invariant=args.invariant)
    for name, task in found.items():
        bank.add(name, task)
    # Once the tasks are there: of a rounded model nobody can tell what it was.
    return bank.bfloat16() if args.precision == "bf16" else bank


def run(service: "Service", host: str, port: int, grace: float = 30.0) -> int:
    """Serves until SIGTERM or SIGINT; then new requests get 503, and what was accepted is answered. Returns the status.

    Args:
        grace: seconds until what is unanswered is given up. A second signal gives it up at once.

    Raises: UserError where it cannot listen there.
    """
    import socket

    import uvicorn

    from .app import create_app

    class Server(uvicorn.Server):
        """uvicorn closes its sockets at the first signal: then no one would get a 503, but a refused connection."""

        given_up = False

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            # Only now does it listen, and take signals.
            shown = f"[{host}]" if ":" in host else host
            print(f"serving    http://{shown}:{listening.getsockname()[1]}/", flush=True)

        def handle_exit(self, sig: int, frame: Any) -> None:
            # uvicorn would raise the signals again at the end, and so exit by the signal and not with 0.
            self.given_up = service.stopping
            self.force_exit = self.should_exit = self.given_up
            if not service.stopping:
                service.stopping, self.until = True, time.monotonic() + grace

        async def on_tick(self, counter: int) -> bool:
            # The loop calls it every tenth of a second.
            if service.stopping and not self.should_exit:
                self.given_up = time.monotonic() >= self.until
                self.should_exit = self.given_up or service.in_flight == 0
                self.force_exit = self.given_up
            return await super().on_tick(counter)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except OSError as error:
            raise UserError(f"cannot listen on {host} port {port}: {error.strerror}") from error
        config = uvicorn.Config(
            create_app(service), log_level="warning", access_log=False, timeout_graceful_shutdown=5, server_header=False
        )
        server = Server(config)
        server.run(sockets=[listening])
    print(
        "stopped    " + ("before all was answered" if server.given_up else "all that was accepted is answered"),
        flush=True,
    )
    return int(server.given_up)

"""SASS lint for wgmma with operand A in registers: is a register touched while a wgmma that uses it may be running?

wgmma (HGMMA) is asynchronous. Until WARPGROUP.DEPBAR says that its group has finished, its A registers must not be
written, and its accumulators neither written nor read except by the next HGMMA. The lint follows every path of the
control flow with the groups that may be pending. It can prove a hazard in the code, not a fault in the hardware.
"""

import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;")
_LABEL = re.compile(r"^\s*(\.L_x_\d+):")
_HGMMA = re.compile(r"HGMMA\.64x(\d+)x16\S* R(\d+), (?:R(\d+)|gdesc)")
# Registers that an instruction writes or stores, by a part of its name; otherwise 1.
_WIDTHS = {".128": 4, "88.4": 4, "88.2": 2, ".64": 2, "WIDE": 2, "CS2R": 2}
# Instructions whose first operand is no general register that they write.
_NO_RESULT = (
    "ST", "RED", "BAR", "BRA", "BSYNC", "BSSY", "EXIT", "NOP", "WARP", "SYNCS", "ISETP", "FSETP", "PLOP3", "UTMA",
    "FENCE", "MEMBAR", "U", "R2UR", "ERRBAR", "DEPBAR", "CCTL", "VOTEU", "BPT", "CALL", "RET",
)  # fmt: skip


def functions(text: str) -> dict[str, list[str]]:
    """nvdisasm -c output -> the lines of every function."""
    found, lines = {}, None
    for line in text.splitlines():
        start = re.match(r"\s*\.section\s+\.text\.([^,\s]+)", line)
        if start:
            lines = found[start[1]] = []
        elif re.match(r"\s*\.section\s", line):
            lines = None
        elif lines is not None:
            lines.append(line)
    return found


def parse(lines: list[str]) -> tuple[list[str], dict[str, int]]:
    """Instructions in order, and the index that each label stands for."""
    instructions, labels = [], {}
    for line in lines:
        label, instruction = _LABEL.match(line), _INSTRUCTION.search(line)
        if label:
            labels[label[1]] = len(instructions)
        elif instruction:
            instructions.append(" ".join(instruction[1].split()))
    return instructions, labels


def _touched(instruction: str) -> tuple[set[int], set[int]]:
    """General registers that an instruction writes and reads."""
    body = re.sub(r"^@!?U?P\w+ ", "", instruction)
    mnemonic, _, operands = body.partition(" ")
    width = next((n for part, n in _WIDTHS.items() if part in mnemonic), 1)
    parts = [part.strip() for part in operands.split(",")]
    written: set[int] = set()
    if not mnemonic.startswith(_NO_RESULT):
        while parts and re.fullmatch(r"!?U?P(\d+|T)", parts[0]):
            parts.pop(0)
        result = re.match(r"R(\d+)", parts[0]) if parts else None
        if result:
            written = set(range(int(result[1]), int(result[1]) + width))
            parts.pop(0)
    read = set()
    for number, wide in re.findall(r"\bR(\d+)(\.64)?", " ".join(parts)):
        read |= set(range(int(number), int(number) + (2 if wide else 1)))
    stored = re.match(r"R(\d+)", parts[-1]) if mnemonic.startswith("ST") and parts else None
    if stored:
        read |= set(range(int(stored[1]), int(stored[1]) + width))
    return written, read


def register_operand_count(instructions: list[str]) -> int:
    """How many HGMMA take A from registers."""
    return sum(bool((m := _HGMMA.search(i)) and m[3]) for i in instructions)


def hazards(instructions: list[str], labels: dict[str, int]) -> list[str]:
    """Every instruction that touches a register of a wgmma that may still be running, on any path."""
    found: dict[int, str] = {}
    # A state: next instruction, groups pending (oldest first), registers of the group not yet committed. A group is
    # (A registers, accumulators).
    empty = (frozenset(), frozenset())
    stack, seen = [(0, (), empty)], set()
    while stack:
        state = stack.pop()
        if state in seen or state[0] >= len(instructions):
            continue
        seen.add(state)
        index, pending, group = state
        instruction = instructions[index]
        running = (*pending, group)
        hgmma, depbar = _HGMMA.search(instruction), re.search(r"DEPBAR\.LE gsb0, 0x(\w+)", instruction)
        if hgmma:
            first, size = int(hgmma[2]), int(hgmma[1]) // 2
            a = set() if hgmma[3] is None else set(range(int(hgmma[3]), int(hgmma[3]) + 4))
            sums = set(range(first, first + size))
            if any(sums & g[0] for g in running):
                found[index] = f"{instruction}: accumulates into a register that a running wgmma reads"
            group = (group[0] | a, group[1] | sums)
            if "gsb0" in instruction:
                pending, group = (*pending, group), empty
        elif depbar:
            left = int(depbar[1], 16)
            pending = pending[-left:] if left else ()
        else:
            written, read = _touched(instruction)
            for a, sums in running:
                if written & (a | sums):
                    found[index] = f"{instruction}: writes a register of a running wgmma"
                elif read & sums:
                    found[index] = f"{instruction}: reads an accumulator of a running wgmma"
        branch = re.search(r"BRA\S* .*?`\((\.L_x_\d+)\)", instruction)
        conditional = instruction.startswith("@") or ".DIV" in instruction or "BRA.U" in instruction
        if branch:
            stack.append((labels[branch[1]], pending, group))
        if not (branch or re.match(r"EXIT|RET", instruction)) or conditional:
            stack.append((index + 1, pending, group))
    return [found[i] for i in sorted(found)]

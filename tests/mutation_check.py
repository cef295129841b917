"""Breaks each kernel and module in one place and shows that a test fails: python tests/mutation_check.py [SUBSTRING].

Works on a copy of the tree, so that nothing here is touched. Exit status 1 where a mutation survived, or where its
pattern no longer occurs exactly once. Tests that fail without any mutation are named and left out. With SUBSTRING only
mutations whose name or file contains it.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEFT_OUT = shutil.ignore_patterns(".git", "build", "*.egg-info", "__pycache__", ".pytest_cache", ".ruff_cache")

REFERENCE = ["tests/kernels/test_reference.py"]
CPU = ["tests/kernels/test_cpu.py", "-k", "not narrower"]
GROUPED = ["tests/kernels/test_grouped.py"]
WEIGHT_GRAD = ["tests/kernels/test_weight_grad.py", "-k", "not narrower"]
UPDATE = ["tests/kernels/test_update.py", "-k", "cpu"]
EMULATED = ["tests/kernels/test_update.py", "-k", "emulator"]
CUDA_GROUPED = ["tests/kernels/test_cuda_grouped.py", "-k", "emulator and (test_grouped or invariant)"]
SWAP = ["tests/kernels/test_swap.py", "-k", "emulator"]
OPS = ["tests/kernels/test_ops.py"]
LOW_RANK = ["tests/kernels/test_low_rank.py"]
BACKENDS = ["tests/kernels/test_backends.py"]
DISPATCH = ["tests/kernels/test_dispatch.py"]
GPU_SCRIPT = ["tests/test_gpu_script.py", "-k", "not rehearsal"]
TRITON = ["tests/kernels/triton_interpret_cases.py", "tests/kernels/triton_interpret_draw.py"]
MODULES = ["tests/rmt/test_modules.py", "-k", "not vit_b"]
BACKWARD = ["tests/rmt/test_backward.py"]
OPTIM = ["tests/rmt/test_optim.py"]
TRAIN = ["tests/rmt/test_train.py"]
PLAN_WORLD = ["tests/rmt/test_plan_world.py", "-k", "not command and not mistakes and not hands_over"]
CODEC = ["tests/kernels/test_codec.py"]
TASK = ["tests/rmt/test_checkpoint.py"]
SERVE = ["tests/rmt/test_serve.py"]
TOWERS = ["tests/rmt/test_peers_towers.py"]
PEERS_TEXT = ["tests/rmt/test_peers_text.py", "-k", "not learns"]
HEADS = ["tests/rmt/test_peers_heads.py"]
SERVE_TASKS = ["tests/rmt/test_serve_tasks.py"]
COMPOSE = ["tests/rmt/test_compose.py"]
COMPARE = ["tests/rmt/test_compare.py"]
STACKING = ["tests/rmt/test_stacking.py"]
HUB = ["tests/rmt/test_hub.py"]
BANK = ["tests/rmt/test_bank.py"]
RIVALS = ["tests/rmt/test_rivals.py"]
ABLATE = ["tests/rmt/test_ablate.py"]
REPORT = ["tests/rmt/test_report_compare.py"]
ROUTING = ["tests/rmt/test_routing.py"]
ROUTING_OPTIONS = ["tests/rmt/test_routing_options.py", "-k", "fold or split or relu"]
ROUTING_MASKS = ["tests/rmt/test_routing_masks.py"]
HF_HOSTS = ["tests/rmt/test_routing_hf.py"]
BEAMS = ["tests/rmt/test_routing_beams.py"]
ROUTING_DATA = ["tests/rmt/test_routing_data.py"]
ROUTING_TRAIN = ["tests/rmt/test_routing_train.py"]
ROUTING_COMMAND = ["tests/rmt/test_routing_command.py"]
TRAIN_STEP = ["tests/rmt/test_train_step.py", "-k", "not quick"]
# Without the processes of world_tools: no gloo, no second interpreter.
WORLD = ["tests/rmt/test_world.py", "-k", "shares_are or bucket or old_store or away"]
RANKS = ["tests/rmt/test_world.py", "-k", "end_with_the_scores_of_one"]
CAPTIONS = ["tests/rmt/test_routing_captions.py"]
SWEEP = ["tests/rmt/test_sweep.py", "-k", "identity or added_once or two_sweeps or handed"]
ROUTING_HF = ["tests/rmt/test_routing_command_hf.py"]

# (what is broken, file, text that occurs once, its replacement, tests that must notice)
MUTATIONS = [
    ("the dead ranks' offer is taken", "rmt/meet.py", "if offer.split()[rank : rank + 1] == [mine]:", "if True:",
     WORLD),
    ("a bucket leaves before its last gradient", "rmt/reduction.py", "self._counts[i] == self._expected[self._side][i]",
     "self._counts[i] >= 1", WORLD),
    ("an owner's bits are told and not taken", "rmt/shards.py", "self._bits(i).copy_(bits)", "pass", RANKS),
    ("rows draw as a mask of their own", "rmt/optim.py", '{"offsets": [m.offset for m in found]}', '{}', RANKS),
    ("each rank's L2 term has its rows' norm", "rmt/row_shards.py", "counts[live], norms[live] = ",
     "counts[live], _ = ", RANKS),
    ("bits are not those of the scores that a run goes on with", "rmt/resume.py", "optimizer.shards.follow()", "pass",
     ["tests/rmt/test_world.py", "-k", "fully_sharded_run"]),
    ("parts of a batch overwrite one another's rows", "rmt/row_gradients.py",
     "buffer.copy_(mine) if first else buffer.add_(mine)", "buffer.copy_(mine)", RANKS),
    ("the last ranks' padding is taken for bits", "rmt/row_shards.py", "bits.shape[1])[: len(bits)]",
     "bits.shape[1])[-len(bits) :]", RANKS),
    ("another than its owner gets a bucket's sums", "rmt/reduction.py", "self.owners[n] if self.owners",
     "(self.owners[n] + 1) % self.world.size if self.owners", RANKS),
    ("bits of scores that are elsewhere are packed", "rmt/compact.py", "if prefix in self._away:", "if False:", WORLD),
    ("a rank's loss weighs as if it had the whole batch", "rmt/step.py", "(total or len(image))", "len(image)", RANKS),
    ("sweep: a held backbone is copied", "rmt/sweep/share.py", "if held is None else held[name]",
     "if held is None else held[name].clone()", ["tests/rmt/test_sweep.py", "-k", "holder"]),
    ("sweep: a run has two rows", "rmt/sweep/table.py", 'if row["id"] in self.rows:', "if not row:", SWEEP),
    ("sweep: a run is the same on other data", "rmt/sweep/identity.py", '"data": contents.of_data(run.config)',
     '"data": ""', SWEEP),
    ("sweep: a lock of a number that was given anew", "rmt/sweep/lock.py",
     'if here and _started(pid) != other.get("started"):', "if here and _started(pid) is None:", SWEEP),
    ("sweep: a handed model is read all the same", "rmt/sweep/share.py", "clip.HANDED[model.key] =",
     "clip.HANDED[None] =", SWEEP),
    ("routing: a recomputed block takes what is current", "rmt/routing/context.py", "visual = self._marked(x)", "pass",
     ROUTING),
    ("routing: folded without its function", "rmt/routing/fold.py", "up @ (m @ down_t)",
     "up @ down_t.view(len(m), -1, down_t.shape[-1])", ROUTING_OPTIONS),
    ("spread to one side", "rmt/masking.py", "width * (1 - 2 * philox", "width * (1 - philox",
     ["tests/rmt/test_masking.py", "-k", "spread"]),
    ("routing: masks freeze what was injected", "rmt/masking.py", "[mask.scores for mask in found] + routed",
     "[mask.scores for mask in found]", ROUTING_MASKS),
    ("a layer's x_R counts its padding", "rmt/routing/bart.py", "x * seen).sum", "x).sum", HF_HOSTS),
    ("a layer of transformers is watched by hooks", "rmt/routing/watch.py", "    if not hasattr(type(block), ",
     "    if not hasattr(type(block), 'no ' + ", HF_HOSTS),
    ("the image's token is masked", "rmt/routing/hf.py", '"attention_mask": F.pad(mask, (1, 0), value=1)',
     '"attention_mask": F.pad(mask, (1, 0), value=0)', BEAMS),
    ("beams continue another image's", "rmt/routing/beams.py", "parent + open_ *", "parent + 0 *", BEAMS),
    ("a thin product where it saves little", "rmt_kernels/low_rank.py", "return GAIN * x_v", "return x_v", LOW_RANK),
    ("a thin product brings a wider sum down", "rmt_kernels/low_rank.py", "out.dtype == t.dtype == v.dtype", "True",
     LOW_RANK),
    ("gram over half of x_v^T x_v", "rmt_kernels/low_rank.py", "x_t @ (x_v.mT @ x_v)",
     "x_t @ (x_v.mT @ x_v).tril()", LOW_RANK),
    ("expand does not sum", "rmt_kernels/routing.py", "x_t.sum(-1, keepdim=True) * x_v", "x_t * x_v", LOW_RANK),
    ("a branch without dropout", "rmt/routing/layers.py",
     "x = F.dropout(x, self.dropout, self.training)\n            return", "return",
     ["tests/rmt/test_routed_low_rank.py"]),
    ("the official VQA accuracy counts the person left out", "rmt/data/vqa.py",
     "(matches - (own == given)) / 3", "matches / 3", ROUTING_DATA),
    ("captions of an epoch are not shuffled", "rmt/data/text_batches.py",
     'random.Random(f"order {self.seed} {epoch}").shuffle(order)', "pass", ROUTING_DATA),
    ("padding counts in the caption loss", "rmt/routing/train.py",
     "labels.flatten(), ignore_index=pad)", "labels.flatten())", ROUTING_TRAIN),
    ("dropout goes on with the stream it finds", "rmt/routing/train.py",
     "torch.manual_seed(config.seed * 1_000_003 + step)", "pass", ROUTING_TRAIN),
    ("a finished caption goes on", "rmt/routing/evaluate.py",
     "logits[:, -1].argmax(-1).masked_fill(done, pad)", "logits[:, -1].argmax(-1)", ROUTING_TRAIN),
    ("CIDEr-D without its clip", "rmt/routing/scores.py",
     "min(weight, b.get(gram, 0.0)) * b.get(gram, 0.0)", "weight * b.get(gram, 0.0)", ROUTING_TRAIN),
    ("an answer head is not read back", "rmt/routing/run.py",
     "load(others, Path(run) / FILE)", "pass", ROUTING_HF),
    ("padding is a word of GPT-2's", "rmt/routing/hf_load.py", "PAD = -100", "PAD = 4", ROUTING_HF),
    ("what is drawn is drawn anew", "rmt/routing/hf_load.py", "torch.manual_seed(config.seed)", "pass", ROUTING_HF),
    ("a stopped routing run starts anew", "rmt/routing/train.py",
     "range(resume.steps_done if resume else 0, len(rates))", "range(len(rates))", ROUTING_COMMAND),
    ("another image is the image itself", "bench/real/captions.py", "mine.roll(len(mine) // 2)", "mine", CAPTIONS),
    ("a word is predicted from itself, not from what is before it", "bench/real/captions_model.py",
     "[:, -tokens.shape[1] :]", "[:, : tokens.shape[1]]", CAPTIONS),
    ("x_R is not the image of the call", "bench/real/captions_model.py",
     "return None if image is None else image[:, None]", "return None if image is None else 0 * image[:, None]",
     CAPTIONS),
    ("Tip-Adapter's keys vote with what they are not", "rmt/peers/tip.py", "beta * (affinity - 1)", "beta * affinity",
     HEADS),
    ("Tip-Adapter's search takes the last of equals", "rmt/peers/tip.py",
     "if score > best", "if score >= best", HEADS),
    ("Tip-Adapter-F keeps its last keys", "rmt/peers/tip.py", "if hits > best[0]:", "if True:", HEADS),
    ("CLIP-Adapter's ratio on the other part", "rmt/peers/clip_adapter.py", "(1 - RATIO) * features",
     "RATIO * features", HEADS),
    ("class vectors of length 1 before training", "rmt/peers/linear_probe.py", "state.text * length", "state.text * 1",
     HEADS),
    ("the epoch of warm-up costs none of the cosine", "rmt/peers/heads.py", "(n - 1) / epochs", "n / epochs", HEADS),
    ("a linear probe of classes it has not seen", "rmt/peers/linear_probe.py", "    if lost:", "    if False:", HEADS),
    ("learned words for every call of the tower", "rmt/peers/context.py",
     "if args[0].data_ptr() != own.data_ptr():", "if False:", PEERS_TEXT),
    ("learned words stay in the tower", "rmt/peers/context.py", "handle.remove()", "pass", PEERS_TEXT),
    ("one image's words for all", "rmt/peers/cocoop.py", "vectors[image])", "vectors[image * 0])", PEERS_TEXT),
    ("LoRA scaled by its rank, not its root", "rmt/peers/lora.py", "ALPHA / math.sqrt(RANK)", "ALPHA / RANK", TOWERS),
    ("one drop for q, k and v", "rmt/peers/lora.py",
     "F.dropout(x.reshape(1, -1, x.shape[-1]).expand(3, -1, -1), DROPOUT, self.training)",
     "F.dropout(x.reshape(1, -1, x.shape[-1]), DROPOUT, self.training).expand(3, -1, -1)", TOWERS),
    ("LoRA's text tower stays", "rmt/peers/lora.py", "        text = class_vectors(footing, model)\n",
     "        text = state.text\n", TOWERS),
    ("full fine-tuning without clipping", "rmt/peers/full_ft.py", "lr, decay, clip = 1e-5, 0.1, 1.0",
     "lr, decay, clip = 1e-5, 0.1, None", TOWERS),
    ("WiSE-FT is the fine-tuned model", "rmt/peers/full_ft.py", "(1 - ALPHA) * p + ALPHA *", "0 * p +", TOWERS),
    ("sign drops where there is no general gradient", "rmt/rivals.py", "a.sign() * b.sign() >= 0",
     "a.sign() * b.sign() > 0", RIVALS),
    ("random keeps the share of a rounded probability", "rmt/rivals.py", "keep_probability(a, b).mean(",
     "keep_probability(a, b).round().mean(", RIVALS),
    ("the L2 term twice with a rival", "rmt/optim.py", "replace(dropout, general=False, l2=0.0)",
     "replace(dropout, general=False)", RIVALS),
    ("an older resume file is another run's", "rmt/config.py",
     "theirs == mine or from_yaml(theirs, kind) == from_yaml(mine, kind)", "theirs == mine", RIVALS),
    ("an ablation's runs are never stretched", "rmt/ablations.py", "epochs=config.train.epochs",
     "epochs=full.train.epochs", ABLATE),
    ("zero-shot shared by models of other masks", "rmt/run.py", "(mask.key, mask.selected is None)", "()", ABLATE),
    ("answers in the order of the tasks", "rmt/bank.py",
     "index_copy_(0, index, features)", "copy_(features)", BANK),
    ("a swap does not wait", "rmt/bank.py", "with self._swap.writing():", "with contextlib.nullcontext():", BANK),
    ("a task of another backbone", "rmt/bank_tasks.py", "got != task.base_sha256", "got == task.base_sha256", BANK),
    ("a swap leaves what has nothing off", "rmt/bank_swap.py",
     "news.append(bits[key] if masked else", "news.append(bits[key] if masked else buffer.clone() if not masked else",
     BANK),
    ("one product for all rows of the projection", "rmt/bank_layers.py",
     "torch.cat([func(row, args[1]) for row in args[0].split(1)])", "func(*args)", BANK),
    ("AMX sums begin anew with every block", "csrc/cpu/masked_linear_amx.cpp", "if (begins) {", "if (true) {",
     GROUPED),
    ("a removed task's rows are run", "rmt/serve/batching.py", "known = {*self.bank.tasks, BASE}",
     "known = {task for job, row in batch for task in [job.rows[row][1]]}", SERVE_TASKS),
    ("a batch runs over", "rmt/serve/batching.py", "else self.max_batch - len(batch)",
     "else len(job.rows)", SERVE),
    ("chunks are not counted", "rmt/serve/edge.py", "got += len(message.get(\"body\", b\"\"))", "got += 0", SERVE),
    ("a link leads out", "rmt/serve/service.py",
     "if folder.is_relative_to(root) and file.is_relative_to(root):", "if folder.is_relative_to(root):", SERVE_TASKS),
    ("pad bits of a difference", "rmt/compose.py",
     'torch.bool)) if operation == "difference" else made', 'torch.bool)) if operation == "none" else made', COMPOSE),
    ("a vote too few", "rmt/compose.py", "rk.pack_bits(off < votes)", "rk.pack_bits(off <= votes)", COMPOSE),
    ("population of all weights", "rmt/compare_tasks.py",
     "task.selected.get(key, n * k) for task in (a, b)", "n * k for task in (a, b)", COMPARE),
    ("saddlepoint without the lattice", "rmt/chance.py",
     "u = -math.expm1(-t) * math.sqrt(variance)", "u = t * math.sqrt(variance)", COMPARE),
    ("peft writes under a mask", "rmt/stacking.py", '("merge", "unmerge", "set_base_weight")', '("unmerge",)',
     STACKING),
    ("mask over an adapter", "rmt/masking.py", "    _need_unwrapped(model, names)\n", "", STACKING),
    ("download not compared with its hash", "rmt/hub.py",
     "    _need_its_hash(Path(found), path_or_id)\n", "", HUB),
    ("threshold not strict", "rmt_kernels/reference.py",
     "_accurate(scores) > threshold", "_accurate(scores) >= threshold", REFERENCE),
    ("eps dropped", "rmt_kernels/reference.py", "b.abs() + GDR_EPS)", "b.abs() + 1e-30)", REFERENCE),
    ("sign of b", "rmt_kernels/reference.py", "a.sign() * (a + b)", "a.sign() * (a - b)", REFERENCE),
    ("L2 term joins both gradients", "rmt_kernels/reference.py",
     "    kept = keep_probability(a, b)",
     "    b = b if penalty is None else b + penalty * scores; kept = keep_probability(a, b)", REFERENCE),
    ("high counter word lost", "rmt_kernels/reference.py", "group & LOW32, group >> 32", "group & LOW32, group * 0",
     REFERENCE),
    ("T instead of T squared", "rmt_kernels/reference.py", ".softmax(-1)) * temperature", ".softmax(-1))", REFERENCE),
    ("betas swapped", "rmt_kernels/reference.py", "m.lerp_(g, 1 - beta1)", "m.lerp_(g, 1 - beta2)", REFERENCE),
    ("threshold not strict when packing", "csrc/cpu/elementwise.cpp",
     "compare32(s, threshold)", "compare32(s, std::nextafter(threshold, -1.0f))", [*OPS, "-k", "at_the_threshold"]),
    ("threshold not strict in the update", "csrc/cpu/mask_update.cpp",
     "compare32(s, p.threshold)", "compare32(s, std::nextafter(p.threshold, -1.0f))",
     [*OPS, "-k", "at_the_threshold"]),
    ("tail mask off by one", "csrc/cpu/elementwise.cpp",
     "bits[word] = compare32(s, threshold) & tail_mask(count)",
     "bits[word] = compare32(s, threshold) & tail_mask(count + 1 < 32 ? count - 1 : count)", CPU),
    ("eps dropped", "csrc/cpu/gradient.h", "std::fabs(b[j]) + 1e-8f)", "std::fabs(b[j]) + 1e-30f)", CPU),
    ("rows of a layer draw as its first ones", "csrc/cpu/simd.h", "group += draw.offset / 4;", "", UPDATE),
    ("moments of a shard are rounded as the first one's", "csrc/cuda/mask_update.cu",
     "layer.stream + kRoundingStream, drawn", "layer.stream + kRoundingStream, at", EMULATED),
    ("draw of a neighbour", "csrc/cpu/gradient.h",
     "static_cast<uint64_t>(first + j) / 4, words + j)", "static_cast<uint64_t>(first + j) / 4 + 1, words + j)", CPU),
    ("flipped word not rewritten", "csrc/cpu/mask_update.cpp",
     "if (now == before) continue;", "if (now >= before) continue;", [*CPU[:1], *OPTIM, *CPU[1:]]),
    ("rounding by the numbers of the dropout", "csrc/cpu/mask_update.cpp",
     "rounding.stream += kRoundingStream", "rounding.stream += 0", UPDATE),
    ("moments cut off, not rounded", "csrc/cpu/moments.h", "(above + (r << 4) + 8) >> 20", "above >> 20", UPDATE),
    ("norm of the scores before", "csrc/cpu/mask_update.cpp",
     "sums.squares += squares_of(s);", "sums.squares += at ? squares_of(s) : 0;", UPDATE),
    ("padding in the norm", "csrc/cpu/mask_update.cpp",
     "if (count < kTile) std::memset(s + count", "if (false) std::memset(s + count", UPDATE),
    ("pad bits of another mask written", "csrc/cpu/simd.h", "changed &= tail_mask(count);", "", GROUPED),
    ("draw of a ragged row", "csrc/cuda/method.cuh", "if (skip == 0) return;", "return;", EMULATED),
    ("exponent of half a block", "csrc/cuda/mask_update.cu",
     "max(mine[0], largest[0][warp ^ 1])", "max(mine[0], largest[0][warp])", EMULATED),
    ("a group without a mask loses a column", "csrc/cuda/masked_linear_small.cu",
     "nullptr ? 0xFFu : bits[low_byte]", "nullptr ? 0xFEu : bits[low_byte]", CUDA_GROUPED),
    ("every tile reads its group's first rows", "csrc/cuda/masked_linear_small.cu",
     "(bits[group]), row * x_stride", "(bits[group]), starts[group] * x_stride", CUDA_GROUPED),
    ("invariant rows leave the kernel where they are many", "rmt_kernels/backends/cuda.py",
     "    if invariant:\n        return", "    if invariant and m <= SMALL_M:\n        return", CUDA_GROUPED),
    ("a swap misses words", "csrc/cuda/masked_weight.cu", "layer.old[word] == bits", "layer.old[word] <= bits", SWAP),
    ("exp_avg_sq rounded to 0", "rmt_kernels/reference.py", "if signed else size > 0", "if signed else size > 1",
     UPDATE),
    ("second moment without its rest", "csrc/cpu/mask_update.cpp",
     "v[j] * beta2 + rest2 * gj * gj", "v[j] * beta2 + rest2 * gj", CPU),
    ("bias missing", "csrc/cpu/masked_linear.cpp", "P::store(y[r] + bias)", "P::store(y[r] + bias * 0)", CPU),
    ("bits of the first columns for all", "csrc/cpu/masked_linear.cpp",
     "block.bits = g.bits + row * words_ + k / 32", "block.bits = g.bits + row * words_", GROUPED),
    ("sums of the columns before lost", "csrc/cpu/masked_linear.cpp",
     "k ? sums[r * M + i] : P::zero()", "P::zero()", GROUPED),
    ("lanes added in another order for few weight rows", "csrc/cpu/lanes.h",
     "_mm_add_ps(c, _mm_movehl_ps(c, c))", "_mm_add_ps(c, _mm_movehdup_ps(c))", GROUPED),
    ("a group's path by the rows of all", "rmt_kernels/backends/cpu.py",
     "decide(\"masked_linear\", x.dtype, n, k, j - i)", "decide(\"masked_linear\", x.dtype, n, k, len(x))", GROUPED),
    ("one of sixteen words rewritten", "csrc/cpu/elementwise.cpp",
     "for (; differ; differ &= differ - 1)", "for (; differ; differ = 0)", GROUPED),
    ("a pass over the rows forgets the one before", "csrc/cpu/weight_grad.cpp", "add || pass", "add", WEIGHT_GRAD),
    ("last row of an odd number lost", "csrc/cpu/weight_grad.cpp",
     "2 * p < rows ? live : 0", "2 * p + 1 < rows ? live : 0", WEIGHT_GRAD),
    ("a group of panels packed by nobody", "csrc/cpu/weight_grad.cpp",
     "least(first + kGroup, f.panels)", "least(first + kGroup - 1, f.panels)", WEIGHT_GRAD),
    ("weight gradient rounded to 16 bits", "rmt_kernels/reference.py",
     "torch.mm(g, x, out=out)", "out.copy_((g @ x).bfloat16())", WEIGHT_GRAD),
    ("words of the wrong row", "rmt_kernels/backends/triton/bits.py",
     "bits_ptr + block_offsets(offs_n, offs_w, words, 1)", "bits_ptr + block_offsets(offs_n, offs_w, words - 1, 1)",
     TRITON),
    ("bits in reverse", "rmt_kernels/backends/triton/bits.py",
     "planes << tl.arange(0, 32)", "planes << (31 - tl.arange(0, 32))", TRITON),
    ("word order", "rmt_kernels/backends/triton/rng.py",
     "tl.join(tl.join(w0, w2), tl.join(w1, w3))", "tl.join(tl.join(w0, w1), tl.join(w2, w3))", TRITON),
    ("stream added to the low key word", "rmt_kernels/backends/triton/rng.py",
     "tl.cast(stream, tl.int64) << 32", "tl.cast(stream, tl.int64) << 0", TRITON),
    ("sign of b", "rmt_kernels/backends/triton/grad.py", "1 + sign * (a + b)", "1 + sign * (a - b)", TRITON),
    ("bias missing", "rmt_kernels/backends/triton/linear.py",
     "tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0)",
     "tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0) * 0", TRITON),
    ("flipped word not rewritten", "rmt_kernels/backends/triton/update.py",
     "load_words(bits_ptr, offs_n, k0 // 32, N, words, BLOCK_K // 32) != new",
     "load_words(bits_ptr, offs_n, k0 // 32, N, words, BLOCK_K // 32) > new", TRITON),
    ("gradient of the scores without the weight", "rmt_kernels/ops.py",
     "rows[1], None, weight, None", "rows[1], None, weight * 0 + 1, None",
     [*MODULES[:1], *REFERENCE, "-k", "straight"]),
    ("gradient of the weight not masked", "rmt_kernels/ops.py",
     "_ops.masked_weight((rows[1].T @ rows[0]).to(weight.dtype), bits, ctx.scores)",
     "(rows[1].T @ rows[0]).to(weight.dtype)", REFERENCE),
    ("strength above one accepted", "rmt_kernels/checks.py",
     'if not 0 <= need_finite("strength", value) <= 1', 'if not 0 <= need_finite("strength", value)', OPS),
    ("unconfirmed GPU kernels by default", "rmt_kernels/backends/__init__.py",
     'not in CONFIRMED:', 'in CONFIRMED:', BACKENDS),
    ("the table's limit exclusive", "rmt_kernels/backends/dispatch.py", "bisect_left(limits, m)",
     "bisect_right(limits, m)", DISPATCH),
    ("the table not asked", "rmt_kernels/backends/cpu.py",
     'if decide("masked_linear", x.dtype, n, k, x.numel() // k).path == "bits":', "if True:", DISPATCH),
    ("a kept masked weight passed over", "rmt_kernels/backends/cuda.py",
     "    if dense is not None:\n        return reference.masked_linear(",
     "    if False:\n        return reference.masked_linear(", DISPATCH),
    ("what failed its tests is timed", "bench/gpu.sh",
     '[ "${result[$need]:-}" != FAIL ] || why=', '[ "${result[$need]:-}" != FAIL ] || echo ', GPU_SCRIPT),
    ("a failed stage forgotten", "bench/gpu.sh", "{ failed=1;", "{ failed=0;", GPU_SCRIPT),
    ("refresh ignores versions", "rmt/masked.py",
     "all(a[0] is b[0] and a[1:] == b[1:] for a, b in zip(old, now))", "True", MODULES),
    ("in-projection without its bias", "rmt/attention.py",
     "self._linear(rows, \"in_proj_\", self.in_proj_bias)", "self._linear(rows, \"in_proj_\", None)",
     [*MODULES[:1], "-k", "attention"]),
    ("scores follow the weights' dtype", "rmt/masked.py",
     "if new.dtype != torch.float32 and not old.is_meta", "if False", MODULES),
    ("masks stay off after an exception", "rmt/masked.py",
     "            module.masked = masked\n", "            module.masked = module.masked\n", MODULES),
    ("second use of a layer dropped", "rmt/gradients.py",
     "accumulate=self._arrived[side][i]", "accumulate=False", BACKWARD),
    ("a gradient without the chain rule", "rmt/gradients.py",
     "self._buffers[side][i].mul_(self.masks[i].weight)", "pass", BACKWARD),
    ("one stream for all layers", "rmt/backward.py", "stream=i,", "stream=0,", BACKWARD),
    ("one stream for all layers of an update", "rmt/optim.py",
     'options = {"streams": live}', 'options = {"streams": [0] * len(live)}', OPTIM),
    ("L2 norm squared", "rmt/backward.py",
     "l2 / scores.norm().clamp_min(torch.finfo(torch.float32).tiny)", "torch.tensor(2 * l2)", BACKWARD),
    ("norms left old", "rmt/optim.py", "if self._seen != self._versions():", "if self._seen is None:", OPTIM),
    ("step never counted", "rmt/optim.py", 'group["step"] += 1', 'group["step"] = 1', OPTIM),
    ("masked weight left old", "rmt/optim.py",
     "dense = [kept for m in found if", "dense = [kept.clone() for m in found if", OPTIM),
    ("student taken for the teacher for ever", "rmt/optim.py",
     "if self._counted != self._versions():", "if self._counted is None:", ["tests/rmt/test_step.py"]),
    ("another token's residual", "rmt/tail.py",
     "x.narrow(dim, 0, 1) + block", "x.narrow(dim, 1, 1) + block", ["tests/rmt/test_tail.py"]),
    ("the teacher keeps its masks", "rmt/clip.py",
     "    with disabled(model):\n        return logits", "    if True:\n        return logits", TRAIN),
    ("losses of parts weighted alike", "rmt/step.py",
     "share = len(x) / (total or len(image))", "share = 1 / len(parts)", TRAIN),
    ("the general loss without its temperature", "rmt/step.py", ".mean() * t * t", ".mean()",
     ["tests/rmt/test_step.py"]),
    ("moments not resumed", "rmt/resume.py", "optimizer.load_state_dict(held)", "pass", TRAIN),
    ("a run goes on with other weights", "rmt/run.py", '"weights": there["weights"], ', "", ["tests/rmt/test_run.py"]),
    ("the way to the threshold without the spread", "rmt/schedule.py", " * (1 - mask.spread)", "",
     ["tests/rmt/test_schedule.py"]),
    ("a cancelled call ends the worker", "rmt/serve/batching.py",
     "if not done.set_running_or_notify_cancel():", "if False:", SERVE_TASKS),
    ("a forced GPU backend has a say on the host", "rmt_kernels/backends/__init__.py",
     'and load(_forced).unavailable("cuda") is None', "and False", BACKENDS),
    ("reach without bias correction", "rmt/schedule.py", " / (1 - beta1**t)", "", ["tests/rmt/test_schedule.py"]),
    ("unselected weights off", "rmt/compact.py",
     "chosen.logical_not()", "torch.zeros_like(chosen)", ["tests/rmt/test_compact.py"]),
    ("SNIP takes absolute values first", "rmt/criteria.py",
     "            total += g\n", "            total += g.abs()\n", ["tests/rmt/test_select.py", "-k", "snip"]),
    ("crops the same in every epoch", "rmt/data/batches.py",
     'f"image {self.seed} {epoch} {index}"', 'f"image {self.seed} {index}"', ["tests/rmt/test_data_batches.py"]),
    ("base half rounded down", "rmt/data/items.py",
     "half = (total + 1) // 2", "half = total // 2", ["tests/rmt/test_data.py"]),
    ("the sample drawn from the base half", "rmt/evaluate.py",
     "    split = read(config)\n",
     "    split = subset(read(config), config.classes)\n    config = dataclasses.replace(config, classes='all')\n",
     ["tests/rmt/test_evaluate.py", "tests/rmt/test_protocols.py"]),
    ("pad bits of a mask stream not looked at", "csrc/cpu/codec.cpp",
     "return tail && remainders[code.remainder_bytes - 1] >> tail ? kRicePad : kRiceGood;", "return kRiceGood;", CODEC),
    ("the largest of equally good Rice parameters", "csrc/cpu/codec.cpp",
     "bits_of_it + code.count >= unary", "bits_of_it + code.count > unary", CODEC),
    ("gaps accepted that are longer than the bits", "rmt_kernels/codec.py",
     "good and expected < raw_bytes", "good", CODEC),
    ("a mask's words not held against the limit", "rmt/task_file.py",
     "if total > limit:", "if total > 2 * limit:", TASK),
    ("other bits than were saved", "rmt/task_file.py",
     '(got := sha256(bits)) != values["bits_sha256"]', '(got := sha256(bits)) == ""', TASK),
    ("another base model accepted", "rmt/checkpoint.py",
     "if not allow_base_mismatch and", "if allow_base_mismatch and", ["tests/rmt/test_checkpoint.py"]),
    ("what is freed stays planned", "rmt/tracking.py",
     "self.events.append((-1, self.blocks.pop(key), \"\"))", "self.blocks.pop(key)", ["tests/rmt/test_plan.py"]),
    ("half of the weight gradients planned", "rmt/tracking.py",
     "return 2 * _rows(g) * out.numel()", "return _rows(g) * out.numel()", ["tests/rmt/test_plan.py", "-k", "flops"]),
    ("a ring sends every byte to every rank", "rmt/plan_traffic.py",
     "(ranks - 1) / ranks * sum", "1 * sum", PLAN_WORLD),
    ("a bucket travels before it is full", "rmt/plan_world.py",
     "free = max(free, a_pass * filled / a_side) +", "free = free +", PLAN_WORLD),
    ("masked weights of others made anew for nothing", "rmt/plan_world.py",
     "(anew - update)", "(-update)", PLAN_WORLD),
    ("strength of base to new as of all classes", "rmt/config.py",
     ' and config.classes == "all"', "", ["tests/rmt/test_config.py"]),
    ("the floor takes one weight gradient for two", "bench/floor.py",
     "for g in cotangents if g is not None]", "for g in cotangents[:1]]", TRAIN_STEP),
    ("a step's scores are not compared", "bench/step_check.py",
     "verdict.apart += int((apart & ~open_).sum())", "verdict.apart += 0", TRAIN_STEP),
    ("a product's result is its operand", "bench/floor.py",
     'self._tensor(call.out, "out")', "self._tensor(call.out, 0)", TRAIN_STEP),
    ("an average over what some methods lack", "rmt/report_means.py",
     "if all(k in methods.get(m, ()) for m in every)]", "if any(k in methods.get(m, ()) for m in every)]", REPORT),
    ("methods on other training images", "rmt/report_cells.py",
     'if first.result["indices_sha256"] != cell.result["indices_sha256"]:', "if False:", REPORT),
    ("the second best is bold", "rmt/report_compare.py", '== places[0]', '== places[-1]', REPORT),
]  # fmt: skip


def pytest(tree: Path, selection: list[str], *options: str, timeout: int = 900) -> str:
    """Output of one pytest run in the copy."""
    environment = {k: v for k, v in os.environ.items() if k != "RMT_BACKEND"}
    # A mutation and its repair may fall into one second, which stale bytecode would not notice.
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "2"}
    if selection is TRITON:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--tb=no", "-rfE", *options, *selection]
    return subprocess.run(
        command, cwd=tree, env=environment, capture_output=True, text=True, timeout=timeout
    ).stdout  # fmt: skip


def failures(output: str) -> list[str]:
    return [m.removesuffix(" -") for m in re.findall(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", output, re.M)]


def build(tree: Path) -> None:
    command = [
        sys.executable,
        "setup.py",
        "-q",
        "build_ext",
        "--inplace",
        "--build-temp",
        str(tree / "build" / "mutants"),
    ]
    environment = os.environ | {"RMT_CUDA_ARCHS": "", "RMT_FORCE_BUILD": "0"}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode or not list((tree / "rmt_kernels").glob("_C*.so")):
        raise SystemExit(f"the copy does not build:\n{done.stdout}{done.stderr}")


def check(tree: Path, mutation: tuple, clean: dict[Path, bytes], known: list[str]) -> str:
    """What became of one mutation: a test that failed, SURVIVED, or PATTERN."""
    _, file, old, new, selection = mutation
    path = tree / file
    text = path.read_text()
    if text.count(old) != 1:
        return f"PATTERN occurs {text.count(old)} times"
    path.write_text(text.replace(old, new))
    try:
        if file.startswith("csrc"):
            build(tree)
        output = pytest(tree, selection, "-x", *(f"--deselect={test}" for test in known))
    except subprocess.TimeoutExpired:
        return "SURVIVED (or ran out of time)"
    finally:
        path.write_text(text)
        for library, content in clean.items():
            # A new file, not the old one's bytes: the loader may still hold those.
            library.unlink(missing_ok=True)
            library.write_bytes(content)
    found = failures(output)
    if not found and " passed" not in output:
        return f"SURVIVED: no test ran: {output[-200:]}"
    return found[0] if found else "SURVIVED"


def main() -> int:
    wanted = sys.argv[1] if len(sys.argv) > 1 else ""
    mutations = [m for m in MUTATIONS if wanted in m[0] or wanted in m[1]]
    rows, bad = [], 0
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        if any(m[1].startswith("csrc") for m in mutations):
            build(tree)
        clean = {library: library.read_bytes() for library in (tree / "rmt_kernels").glob("_C*.so")}
        known: dict[tuple, list[str]] = {}
        for mutation in mutations:
            key = tuple(mutation[4])
            if key not in known:
                known[key] = failures(pytest(tree, mutation[4]))
                for test in known[key]:
                    print(f"fails without any mutation, left out: {test}", flush=True)
            start = time.monotonic()
            result = check(tree, mutation, clean, known[key])
            bad += result.startswith(("SURVIVED", "PATTERN"))
            rows.append((mutation[0], mutation[1], result))
            print(
                f"[{len(rows)}/{len(mutations)}] {time.monotonic() - start:4.0f} s  {' | '.join(rows[-1])}", flush=True
            )
    print("\n| mutation | file | killed by |\n|---|---|---|")
    for row in rows:
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |")
    print(f"\n{len(rows) - bad} of {len(rows)} killed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

"""train.py with one fault injected: `python faulty_train.py FAULT STEP RANK MARKER CONFIG [--key=value ...]`.

FAULT happens at the beginning of STEP on RANK, once: MARKER is a file that is made when it has.
  kill      the process dies (SIGKILL)           crash     it raises
  term      it is sent SIGTERM                   int       it is sent SIGINT
  term_in_save   SIGTERM arrives in the middle of the save after STEP
  kill_in_save   SIGKILL in the middle of the save after STEP
  nan       its loss is not a number             grads     its gradients are written to MARKER before use
  count     the number of gradient reductions of the run is written to MARKER
"""

import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).parent.parent))
import model  # noqa: E402
import train  # noqa: E402
from config import cli  # noqa: E402

fault, at_step, at_rank, marker = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
here = int(os.environ.get("RANK", 0)) == at_rank
now = {"step": -1}
draw_iters, forward, rename, adam_step = (
    train.draw_iters,
    model.AbbIE.forward,
    os.rename,
    torch.optim.AdamW.step,
)


def due(*faults) -> bool:
    if fault not in faults or not here or now["step"] != at_step or marker.exists():
        return False
    marker.touch()
    return True


def faulty_draw(spec, seed, step):
    now["step"] = step
    if due("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if due("crash"):
        raise RuntimeError("injected")
    if due("term", "int"):
        os.kill(os.getpid(), signal.SIGTERM if fault == "term" else signal.SIGINT)
    return draw_iters(spec, seed, step)


def faulty_rename(old, new):
    if due("term_in_save", "kill_in_save"):
        os.kill(os.getpid(), signal.SIGTERM if fault == "term_in_save" else signal.SIGKILL)
    rename(old, new)


def faulty_forward(self, idx, targets=None, iters=None):
    logits, loss = forward(self, idx, targets, iters)
    return logits, loss * float("nan") if self.training and torch.is_grad_enabled() and due("nan") else loss


def watched_step(self, *args, **kwargs):
    if fault == "grads" and here and now["step"] == at_step:
        grads = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        torch.save(grads, marker)
    return adam_step(self, *args, **kwargs)


class CountedDDP(train.DistributedDataParallel):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register_comm_hook(None, count_and_reduce)


def count_and_reduce(group, bucket):
    if here:
        marker.write_text(str(int(marker.read_text()) + 1 if marker.exists() else 1))
    return allreduce_hook(group, bucket)


if fault == "count":
    train.DistributedDataParallel = CountedDDP
train.draw_iters, os.rename, model.AbbIE.forward = faulty_draw, faulty_rename, faulty_forward
torch.optim.AdamW.step = watched_step
train.show_off = lambda *args: None  # the tasks and the sample at the end have tests of their own
sys.argv = [sys.argv[0], *sys.argv[5:]]
cli(train.main)

"""train.py with one fault injected: `python faulty_train.py FAULT STEP RANK MARKER CONFIG [--key=value ...]`.

FAULT happens at the beginning of STEP on RANK, once: MARKER is a file that is made when it has.
  none      nothing happens                      crash     it raises
  kill      the process dies (SIGKILL)           kill_in_save   the same, in the middle of the next save
  term      it is sent SIGTERM                   term_in_save   the same, in the middle of the next save
  int       it is sent SIGINT                    nan       its loss is not a number
  grads     its gradients are written to MARKER before use
  count     they, too, and how often gradients were averaged until then
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  (the processes that tests fork have it then)
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

sys.path.insert(0, str(Path(__file__).parent.parent))
import model  # noqa: E402
import train  # noqa: E402
from config import cli  # noqa: E402


class Fault:
    """Stands in for what train.py calls, and strikes there."""

    def __init__(self, name: str, step: str, rank: str, marker: str):
        self.name, self.step, self.marker = name, int(step), Path(marker)
        self.here = int(os.environ.get("RANK", 0)) == int(rank)
        self.now, self.reductions = -1, 0
        self.draw_iters, self.rename = train.draw_iters, os.rename
        self.forward, self.adam_step = model.AbbIE.forward, torch.optim.AdamW.step

    def inject(self):
        train.draw_iters, os.rename = self.draw_iters_faulty, self.rename_faulty
        model.AbbIE.forward = lambda net, *args: self.forward_faulty(net, *args)
        torch.optim.AdamW.step = lambda optimizer: self.adam_step_watched(optimizer)
        if self.name == "count":
            train.DistributedDataParallel = self.counted_ddp()

    def due(self, *names) -> bool:
        if self.name not in names or not self.here or self.now != self.step or self.marker.exists():
            return False
        self.marker.touch()
        return True

    def draw_iters_faulty(self, spec, seed, step):
        self.now = step
        if self.due("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.due("crash"):
            raise RuntimeError("injected")
        if self.due("term"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.due("int"):
            os.kill(os.getpid(), signal.SIGINT)
        return self.draw_iters(spec, seed, step)

    def rename_faulty(self, old, new):
        if self.due("term_in_save"):
            os.kill(os.getpid(), signal.SIGTERM)
        if self.due("kill_in_save"):
            os.kill(os.getpid(), signal.SIGKILL)
        self.rename(old, new)

    def forward_faulty(self, net, idx, targets=None, iters=None):
        logits, loss = self.forward(net, idx, targets, iters)
        if torch.is_grad_enabled() and self.due("nan"):
            loss = loss * float("nan")
        return logits, loss

    def adam_step_watched(self, optimizer):
        if self.due("grads", "count"):
            grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            torch.save({"grads": grads, "reductions": self.reductions}, self.marker)
        return self.adam_step(optimizer)

    def counted_ddp(self):
        class CountedDDP(train.DistributedDataParallel):
            def __init__(ddp, *args, **kwargs):
                super().__init__(*args, **kwargs)
                ddp.register_comm_hook(None, self.count_and_reduce)

        return CountedDDP

    def count_and_reduce(self, group, bucket):
        self.reductions += 1
        return allreduce_hook(group, bucket)


def main(argv: list[str]):
    Fault(*argv[:4]).inject()
    train.show_off = lambda *args: None  # the tasks and the sample at the end have tests of their own
    train.main(argv[4:])


def as_rank(rank: int, world: int, port: int, argv: list[str], folder: Path):
    """This process as one of `world` ranks that torchrun would start, its output in files in folder."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    if world > 1:
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    os.chdir(folder)
    sys.argv = ["train.py", *argv]
    cli(main)


if __name__ == "__main__":
    cli(main)

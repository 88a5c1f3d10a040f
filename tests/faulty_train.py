"""train.py with one fault injected: `python faulty_train.py FAULT STEP RANK MARKER CONFIG [--key=value ...]`.

FAULT happens at the beginning of STEP on RANK, once: MARKER is a file that is made when it has.
  none              nothing happens
  crash             it raises
  kill, term, int   it is sent SIGKILL, SIGTERM, SIGINT (hup: SIGHUP); kill_in_save, ...: in the next save
  nan               its loss is not a number
  grads             its gradients are written to MARKER, and how often they have been averaged over ranks
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

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "hup": signal.SIGHUP}


def inject(fault: str, fault_step: str, fault_rank: str, marker: str):
    """Wrap what train.py calls in functions that strike there."""
    here, now, reductions = os.environ.get("RANK", "0") == fault_rank, None, 0
    draw_iters, rename = train.draw_iters, os.rename
    forward, adam_step = model.AbbIE.forward, torch.optim.AdamW.step

    def due(name: str) -> bool:
        if fault != name or not here or now != int(fault_step) or Path(marker).exists():
            return False
        Path(marker).touch()
        return True

    def send_signal(place: str = ""):
        for name, number in SIGNALS.items():
            if due(name + place):
                os.kill(os.getpid(), number)

    def at_the_beginning(spec, seed, step):
        nonlocal now
        now = step
        send_signal()
        if due("crash"):
            raise RuntimeError("injected")
        return draw_iters(spec, seed, step)

    def in_a_save(old, new):
        send_signal("_in_save")
        rename(old, new)

    def in_the_forward_pass(net, idx, targets=None, iters=None, backprop_iters=0):
        logits, loss = forward(net, idx, targets, iters, backprop_iters)
        if torch.is_grad_enabled() and due("nan"):
            loss = loss * float("nan")
        return logits, loss

    def before_the_update(optimizer):
        if due("grads"):
            grads = [p.grad.clone() for group in optimizer.param_groups for p in group["params"]]
            torch.save({"grads": grads, "reductions": reductions}, marker)
        return adam_step(optimizer)

    def count_and_reduce(group, bucket):
        nonlocal reductions
        reductions += 1
        return allreduce_hook(group, bucket)

    class CountedDDP(train.DistributedDataParallel):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.register_comm_hook(None, count_and_reduce)

    train.draw_iters, os.rename, train.DistributedDataParallel = at_the_beginning, in_a_save, CountedDDP
    model.AbbIE.forward, torch.optim.AdamW.step = in_the_forward_pass, before_the_update
    train.show_off = lambda *args, **options: None  # which has a test of its own


def main(argv: list[str]):
    inject(*argv[:4])
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

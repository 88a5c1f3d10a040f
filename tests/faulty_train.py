"""train.py with one fault injected: `python faulty_train.py FAULT STEP RANK MARKER CONFIG [--key=value ...]`.

FAULT happens at the beginning of STEP on RANK, once: MARKER is a file that is made when it has.
  none                   nothing happens
  kill, term, int, hup   it is sent SIGKILL, ...; kill_in_save, ...: in the next save
  nan                    its loss is not a number
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch._dynamo  # noqa: F401  (the processes that tests fork have it then)

sys.path.insert(0, str(Path(__file__).parent.parent))
import model  # noqa: E402
import train  # noqa: E402
from config import cli  # noqa: E402


def inject(fault: str, fault_step: str, fault_rank: str, marker: str):
    """Wrap what train.py calls in functions that strike there."""
    here, now = os.environ.get("RANK", "0") == fault_rank, None
    draw_iters, rename, forward = train.draw_iters, os.rename, model.AbbIE.forward

    def due(name: str) -> bool:
        if fault != name or not here or now != int(fault_step) or Path(marker).exists():
            return False
        Path(marker).touch()
        return True

    def send_signal(place: str = ""):
        for name in ("kill", "term", "int", "hup"):
            if due(name + place):
                os.kill(os.getpid(), signal.Signals[f"SIG{name.upper()}"])

    def at_the_beginning(spec, seed, step):
        nonlocal now
        now = step
        send_signal()
        return draw_iters(spec, seed, step)

    def in_a_save(old, new):
        send_signal("_in_save")
        rename(old, new)

    def in_the_forward_pass(net, *args):
        logits, loss = forward(net, *args)
        return logits, loss * (float("nan") if torch.is_grad_enabled() and due("nan") else 1)

    train.draw_iters, os.rename, model.AbbIE.forward = at_the_beginning, in_a_save, in_the_forward_pass
    train.final_report = lambda *args: None  # the main job's test shows it


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

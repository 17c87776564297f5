"""Sampling alone, and beside programs that keep cores busy: all threads, one, or as many as there are idle cores.

    python benchmarks/neighbour.py --policy out/smollm2

A process for each number of threads, in turn, samples the same prompts stage after stage, as a run does; tokens a second are
those of the median stage, the first one left out, in which --threads 0 has not seen a neighbour yet. The neighbour computes
sums, and nothing of it is in memory. Writes neighbour.json into --out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from data import Tokenizer  # noqa: E402
from engine.command import Parser, exit_code  # noqa: E402
from engine.files import write_json  # noqa: E402
from engine.threads import Threads  # noqa: E402
from generate import generate  # noqa: E402
from model import Transformer  # noqa: E402

THREADS = {"all": None, "one": 1, "idle cores": 0}


def stages(args) -> None:
    """In a process of its own: seconds and tokens of each stage, as JSON."""
    threads = Threads(args.threads)
    policy = Transformer.from_pretrained(args.policy, args.dtype)
    tokenizer = Tokenizer(args.policy)
    prompts = [tokenizer.prompt_ids(f"Tell me about {n}", args.template) for n in range(args.prompts)]

    rows = []
    for stage in range(args.stages):
        threads.adapt()
        start = time.monotonic()
        generator = torch.Generator().manual_seed(stage)
        responses = generate(policy, prompts, 4, args.max_new_tokens, tokenizer.stop, 0.7, generator=generator)
        written = sum(len(response) for row in responses for response in row)
        rows.append({"seconds": time.monotonic() - start, "tokens": written, "threads": torch.get_num_threads()})
    print(json.dumps(rows))


@contextmanager
def busy(count: int):
    """So many other programs that never wait."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


def measured(args, wanted: int | None) -> dict:
    """Tokens a second, and the threads of the last stage."""
    own = ["--threads", str(wanted)] if wanted is not None else []
    command = [sys.executable, __file__, "--child", *own]
    for name in ("policy", "dtype", "template", "prompts", "max_new_tokens", "stages"):
        command += ["--" + name.replace("_", "-"), str(getattr(args, name))]
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    rows = json.loads(subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True).stdout)
    rates = [row["tokens"] / row["seconds"] for row in rows[1:]]
    return {"tokens_a_second": statistics.median(rates), "threads": rows[-1]["threads"]}


def run(args) -> None:
    found = {}
    for neighbours in (0, 1):
        with busy(neighbours):
            for name, wanted in THREADS.items():
                row = measured(args, wanted)
                found.setdefault(name, []).append(row)
                beside = "beside one busy program" if neighbours else "alone"
                print(f"{name:12}{beside:26}{row['tokens_a_second']:8.0f} tokens/s   {row['threads']} threads", flush=True)

    quiet = found["all"][0]["tokens_a_second"]
    share = found["idle cores"][1]["tokens_a_second"] / quiet
    print(f"--threads 0 beside one busy program: {share:.2f} of the quiet speed")
    result = {"cores": os.cpu_count(), "torch": torch.__version__, "dtype": args.dtype, "threads": found, "share": share}
    write_json(Path(args.out) / "neighbour.json", result)


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", default="out/smollm2", metavar="DIR", help="checkpoint")
    parser.add_argument("--template", default="chat", help="chat template")
    parser.add_argument("--dtype", default="bfloat16", help="of the weights")
    parser.add_argument("--prompts", type=int, default=8, help="prompts a stage, of four responses each")
    parser.add_argument("--max-new-tokens", type=int, default=32, help="longest response")
    parser.add_argument("--stages", type=int, default=5, help="of each process")
    parser.add_argument("--threads", type=int, default=None, help=argparse.SUPPRESS)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--out", default=str(ROOT / "benchmarks"), metavar="DIR", help="folder")
    args = parser.parse_args(arguments)
    return exit_code("neighbour", lambda: stages(args) if args.child else run(args))


if __name__ == "__main__":
    sys.exit(main())

"""The learned preference model: P(y_i beats y_j | x) from a transformer with two heads.

python prefmodel.py train --pairs pairs.jsonl --backbone DIR --out DIR

Until the judge is finished, its training is kept in DIR.unfinished: the same command continues it.
"""

import engine.quiet  # noqa: F401  first, see there

# isort: split
import argparse
import json
import math
import sys
from dataclasses import dataclass, fields
from os.path import commonprefix
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import TEMPLATES, Pack, Tokenizer, pack, read_pairs
from engine.checkpoint import DTYPES, check_device, load_pretrained, load_weights, save_checkpoint
from engine.command import Parser, add_flags, check_settings, exit_code
from engine.figures import BLUE, GREY, ORANGE, SKY, new_figure, write_figure
from engine.files import (
    atomic_write,
    fingerprint,
    read_json,
    remove,
    require_empty,
    unfinished_folder,
    write_json,
    write_lines,
)
from engine.progress import tqdm
from engine.run_folder import MADE_FROM, Saver, claim, made_from
from model import Decoder, ModelConfig, initialize
from sppo import optimizer_step, setting


class PreferenceModel(nn.Module):
    """Reads prompt and response once and gives a scalar r and a cyclic vector v of size 2k.

    logit P(i beats j) = r_i - r_j + Σ_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l])

    Skew-symmetric by construction, one forward pass a response. cyclic = k = 0 is Bradley–Terry,
    scalar = False is the General Preference Model (2410.02197, Def. 4.3, without its unit norm),
    both together the hybrid of 2605.17342. Of a text that is longer than max_tokens, or than the
    context, it reads the two ends.
    """

    def __init__(
        self, config: ModelConfig, scalar=True, cyclic: int = 2, template="plain",
        max_tokens: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if not scalar and not cyclic:
            raise ValueError("a preference model needs a scalar head or a cyclic head of k > 0")
        D = config.hidden_size
        self.config = config
        self.template = template
        self.max_tokens = max_tokens
        self.tokenizer = None
        self.model = Decoder(config)
        self.scalar_head = nn.Linear(D, 1, bias=False) if scalar else None
        self.cyclic_head = nn.Linear(D, 2 * cyclic, bias=False) if cyclic else None

    def forward(self, tokens: Pack, ends: Tensor) -> tuple[Tensor, Tensor]:
        """Texts and the places (B,) of their last tokens -> r (B,), v (B, 2k) in float32."""
        last = F.embedding(ends, self.model(tokens)[0])  # (B, D)

        # An absent head counts as zeros.
        r = last.new_zeros(len(last)) if self.scalar_head is None else self.scalar_head(last)[:, 0]
        v = last.new_zeros(len(last), 0) if self.cyclic_head is None else self.cyclic_head(last)
        return r.float(), v.float()

    def read(self, texts: list[tuple[str, str]]) -> tuple[Tensor, Tensor]:
        """(prompt, response) pairs -> r, v, with gradients; a prompt's beginning is read once."""
        rows = [self.judged_ids(prompt, response) for prompt, response in texts]
        groups = {}
        for index, (prompt, _) in enumerate(texts):
            groups.setdefault((prompt, rows[index][0]), []).append(index)
        groups = list(groups.values())
        shared = [commonprefix([rows[i] for i in group]) for group in groups]
        own = [[rows[i][len(ids) :] for i in group] for ids, group in zip(shared, groups)]

        device = self.model.embed_tokens.weight.device
        packed, places = pack(shared, own, device)
        lengths = torch.tensor([len(ids) for row in own for ids in row], device=device)
        ends = places.gather(1, lengths[:, None])[:, 0]
        r, v = self(packed, ends)

        # Back from group after group into the order of the texts.
        place = torch.tensor([i for group in groups for i in group]).argsort().to(device)
        return r[place], v[place]

    def judged_ids(self, prompt: str, response: str) -> list[int]:
        """The ids that the model reads: of a text that is too long its two ends."""
        ids = self.tokenizer.judged_ids(prompt, response, self.template)
        context = self.config.max_position_embeddings
        limit = min(context, self.max_tokens or context)
        if len(ids) <= limit:
            return ids

        # The middle goes: the beginning says what was asked, and at the end stand how the response
        # ends, the marks after it, and the token whose hidden state is the verdict.
        first = limit // 2
        return ids[:first] + ids[first - limit :]

    @torch.no_grad()
    def preferences_many(self, prompts: list[str], responses: list, rows: int = 64) -> Tensor:
        """N prompts, N lists of K responses -> (N, K, K); `rows` responses are read together."""
        K = len(responses[0])
        pairs = zip(prompts, responses, strict=True)
        texts = [(prompt, response) for prompt, row in pairs for response in row]
        chunks = [texts[start : start + rows] for start in range(0, len(texts), rows)]
        scores = [self.read(chunk) for chunk in chunks]

        r = torch.cat([r for r, _ in scores]).view(-1, K)
        v = torch.cat([v for _, v in scores]).view(*r.shape, -1)
        return torch.sigmoid(preference_logits(r, v)).cpu()

    @classmethod
    def from_pretrained(cls, folder: str | Path, dtype=None, device=None) -> "PreferenceModel":
        """Read a judge folder: a checkpoint whose config.json has `preference_head`."""
        path = Path(folder) / "config.json"
        head = read_json(path).get("preference_head")
        required = {"scalar", "cyclic", "template"}
        if not isinstance(head, dict) or head.keys() - {"max_tokens"} != required:
            found = "nothing" if head is None else json.dumps(head)
            raise ValueError(f"{path}: preference_head is {found}, expected a judge's heads")
        judge = load_pretrained(cls, ModelConfig.from_json(path), folder, dtype, device, **head)
        judge.tokenizer = Tokenizer(folder)
        judge.tokenizer.check_vocabulary(judge.config.vocab_size)
        return judge

    @classmethod
    def from_backbone(
        cls, folder: str | Path, generator: torch.Generator, device=None, pretrained: bool = True,
        dtype: str | None = None, **head,
    ) -> "PreferenceModel":  # fmt: skip
        """Put fresh heads on a checkpoint's transformer; not pretrained: on one of its shape."""
        config = ModelConfig.from_json(Path(folder) / "config.json")
        judge = initialize(cls(config, **head), generator).to(device, DTYPES[dtype or "float32"])
        if pretrained:
            load_weights(judge.model, folder, unused=("lm_head.",), prefix="model.")
        judge.tokenizer = Tokenizer(folder)
        judge.tokenizer.check_vocabulary(judge.config.vocab_size)
        return judge

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a new judge folder, whole or not at all."""
        with atomic_write(folder) as temporary:
            self.write_pretrained(temporary)

    def write_pretrained(self, folder: str | Path) -> None:
        head = {
            "scalar": self.scalar_head is not None,
            "cyclic": 0 if self.cyclic_head is None else self.cyclic_head.out_features // 2,
            "template": self.template,
        }
        if self.max_tokens is not None:
            head["max_tokens"] = self.max_tokens
        extra = {"architectures": ["PreferenceModel"], "preference_head": head}
        save_checkpoint(self, folder, extra)
        self.tokenizer.copy_to(folder)


def preference_logits(r: Tensor, v: Tensor) -> Tensor:
    """r (..., K), v (..., K, 2k) -> (..., K, K) logits of P(i beats j), skew-symmetric."""
    half = v[..., 0::2] @ v[..., 1::2].transpose(-1, -2)  # Σ_l v_i[2l] v_j[2l+1]
    return r[..., :, None] - r[..., None, :] + half - half.transpose(-1, -2)


# ------------------------------------------------------------------------ training


def train_preference_model(
    judge: PreferenceModel, pairs: list[dict], epochs: int, lr: float, batch: int,
    generator: torch.Generator, progress=None, held_out=(), patience: int | None = None,
    micro_batch: int = 0, saver: Saver | None = None,
) -> list[dict]:  # fmt: skip
    """Fit P(chosen beats rejected) to each pair's probability, hard or soft, by cross-entropy.

    Returns the numbers of each step. With `held_out` pairs, also of each epoch: the judge ends with
    the weights of its best one, and stops after `patience` epochs without a better one. A saver
    keeps what is done, and continues after what it has kept.
    """
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    turns = plan_turns(len(pairs), epochs, batch, held_out, generator)
    total = epochs * -(-len(pairs) // batch)
    size = micro_batch or batch

    saver = saver or Saver(None, math.inf)
    done = saver.resume(judge, optimizer)
    rows = saver.steps
    if progress is not None and done:
        progress.initial = progress.n = rows[-1]["pairs_seen"]  # so that the time left is right

    for row, indices in turns[done:]:
        if patience is not None and epochs_since_best(rows) >= patience:
            break
        if indices is None:
            row |= evaluate_pairs(judge, held_out, size)
            if epochs_since_best([*rows, row]) == 0:
                saver.extra = {name: value.clone() for name, value in judge.state_dict().items()}
        else:
            # Rises over the first tenth of the steps, then falls linearly to 0.
            now = lr * min(row["step"] / (0.1 * total), 1 - (row["step"] - 1) / total)
            chunk = [pairs[i] for i in indices.tolist()]
            row |= train_step(judge, optimizer, chunk, size, now, f"step {row['step']}")
            if progress is not None:
                progress.set_postfix(loss=f"{row['loss']:.3f}", refresh=False)
                progress.update(len(chunk))
        saver.after(row)

    if held_out:
        judge.load_state_dict(saver.extra)
    return rows


def plan_turns(count: int, epochs: int, batch: int, held_out, generator: torch.Generator) -> list:
    """What to do, in order: (the head of a line of metrics, indices of a batch of pairs), and after
    each epoch (.., None): measure on the held-out pairs.
    """
    turns = []
    step = 0
    for epoch in range(1, epochs + 1):
        seen = (epoch - 1) * count
        for indices in torch.randperm(count, generator=generator).split(batch):
            step += 1
            seen += len(indices)
            turns.append(({"step": step, "epoch": epoch, "pairs_seen": seen}, indices))
        if held_out:
            turns.append(({"epoch": epoch, "pairs_seen": seen}, None))
    return turns


def epochs_since_best(rows: list[dict]) -> int:
    """How many epochs were measured after the one of smallest held-out loss."""
    losses = [row["held_out_loss"] for row in rows if "held_out_loss" in row]
    return len(losses) - 1 - losses.index(min(losses)) if losses else 0


def train_step(
    judge: PreferenceModel, optimizer, pairs: list[dict], size: int, lr: float, name: str
) -> dict:
    """One optimizer step on a batch of pairs, `size` of them at a time."""
    logits = []
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        logit = judge_pairs(judge, part)
        loss, _ = agreement(logit, part)
        (loss * (len(part) / len(pairs))).backward()
        logits.append(logit.detach())

    optimizer_step(optimizer, judge, lr, 1.0, name)
    loss, accuracy = agreement(torch.cat(logits), pairs)
    return {"loss": loss.item(), "accuracy": accuracy, "lr": lr}


def judge_pairs(judge: PreferenceModel, pairs: list[dict]) -> Tensor:
    """(b,) logits of P(chosen beats rejected), differentiable."""
    sides = ("chosen", "rejected")
    r, v = judge.read([(pair["prompt"], pair[side]) for pair in pairs for side in sides])
    return preference_logits(r.view(-1, 2), v.view(len(pairs), 2, -1))[:, 0, 1]


def agreement(logit: Tensor, pairs: list[dict]) -> tuple[Tensor, float | None]:
    """Mean cross-entropy of the pairs' labels, and accuracy over those with a majority."""
    probability = torch.tensor([pair["probability"] for pair in pairs], device=logit.device)
    loss = F.binary_cross_entropy_with_logits(logit, probability)

    decided = probability != 0.5
    if not decided.any():
        return loss, None
    right = (logit > 0) == (probability > 0.5)
    return loss, right[decided].float().mean().item()


@torch.no_grad()
def evaluate_pairs(judge: PreferenceModel, pairs: list[dict], batch: int) -> dict:
    """Loss and accuracy on pairs that are not trained on."""
    chunks = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    loss, accuracy = agreement(torch.cat([judge_pairs(judge, chunk) for chunk in chunks]), pairs)
    return {"held_out_loss": loss.item(), "held_out_accuracy": accuracy}


def split_pairs(pairs: list[dict], share: float, generator: torch.Generator) -> list[list[dict]]:
    """[training pairs, held-out pairs]: about `share` of the prompts is held out, each whole."""
    if not 0 <= share < 1:
        raise ValueError(f"--held-out is {share}, expected at least 0 and less than 1")
    prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    apart = {prompts[i] for i in order[: round(share * len(prompts))]}
    training = [pair for pair in pairs if pair["prompt"] not in apart]
    held_out = [pair for pair in pairs if pair["prompt"] in apart]
    if not training or (share > 0 and not held_out):
        raise ValueError(
            f"--held-out {share}, {len(prompts)} prompts: none would be left on a side"
        )
    return [training, held_out]


# ------------------------------------------------------------------------ command line


@dataclass(frozen=True)
class JudgeConfig:
    """The settings of `prefmodel.py train`."""

    from_scratch: bool = setting(False, "take only the backbone's shape, not its weights")
    scalar: bool = setting(True, "scalar head (Bradley–Terry part)")
    cyclic: int = setting(2, "k: size of the cyclic head is 2k; 0 for none", low=0)
    template: str = setting("chat", "how prompt and response are joined", choices=TEMPLATES)
    epochs: int = setting(2, "passes over the pairs", low=1)
    batch: int = setting(32, "pairs per optimizer step", low=1)
    micro_batch: int = setting(0, "pairs per forward pass; 0: the whole batch", low=0, free=True)
    max_tokens: int | None = setting(None, "read of prompt and response, at both ends", low=2)
    lr: float = setting(3e-4, "peak learning rate, after a tenth of the steps", low=1e-12, high=1e3)
    held_out: float = setting(0.0, "share of the prompts that is held out", low=0, high=1)
    patience: int | None = setting(None, "stop after n epochs without a better loss", low=1)
    dtype: str = setting("float32", "of the weights", choices=tuple(DTYPES))
    seed: int = setting(0, "random seed", low=0)
    save_minutes: float = setting(10.0, "minutes between saves; inf: never", low=0, free=True)
    device: str = setting("cpu", "a torch device")


WRITTEN = "the judge, metrics.jsonl and learning.png are there"


def train(args: argparse.Namespace) -> None:
    """The command: read the pairs, train a judge or go on with it, write its folder."""
    check_settings(args, JudgeConfig)
    check_device(args.device)
    if args.patience and not args.held_out:
        raise ValueError("--patience needs --held-out: there is no held-out loss to watch")

    out = Path(args.out)
    unfinished = unfinished_folder(out)
    known = out / MADE_FROM
    if known.exists() and read_json(known) == made_from(*provenance(args)):
        remove(unfinished)  # a process may have died after the judge had its name
        print(f"{out}: finished already; {WRITTEN}")
        return
    require_empty(out)  # before hours of training, not after

    # One generator draws everything: the held-out prompts, the heads, the order of the pairs.
    generator = torch.Generator().manual_seed(args.seed)
    pairs, held_out = split_pairs(read_pairs(args.pairs), args.held_out, generator)
    head = {name: getattr(args, name) for name in ("scalar", "cyclic", "template", "max_tokens")}
    judge = PreferenceModel.from_backbone(
        args.backbone, generator, args.device, not args.from_scratch, args.dtype, **head
    )
    saver = Saver(unfinished, args.save_minutes)
    claim_folder(saver, args)
    total = args.epochs * len(pairs)
    with tqdm(total=total, unit="pair", desc="train judge") as progress, saver:
        steps = train_preference_model(
            judge, pairs, args.epochs, args.lr, args.batch, generator,
            progress, held_out, args.patience, args.micro_batch, saver,
        )  # fmt: skip

    with atomic_write(out) as temporary:
        judge.write_pretrained(temporary)
        write_lines(temporary / "metrics.jsonl", steps)
        write_figure(temporary / "learning.png", learning_curves(steps))
        write_json(temporary / MADE_FROM, made_from(*provenance(args)))
    remove(unfinished)
    print_losses(out, steps, len(pairs), len(held_out))
    if steps[-1]["epoch"] < args.epochs:
        early = f"stopped after epoch {steps[-1]['epoch']} of {args.epochs}"
        print(f"{early}: no better held-out loss for --patience {args.patience}")
    print(f"{out}: {WRITTEN}")


def claim_folder(saver: Saver, args: argparse.Namespace) -> None:
    """Write the settings beside what is saved. ValueError if that was begun with others."""
    if not saver.kept():
        remove(saver.folder)  # nothing to continue: any settings will do

    claim(saver.folder, *provenance(args))


def provenance(args: argparse.Namespace) -> tuple[dict, type, dict]:
    """The settings, their class, and the fingerprints of the files that they name."""
    settings = {field.name: getattr(args, field.name) for field in fields(JudgeConfig)}
    files = {"backbone": args.backbone, "pairs": args.pairs}
    content = {name: fingerprint(path) for name, path in files.items()}
    return settings | files, JudgeConfig, content


def print_losses(out: Path, steps: list[dict], pairs: int, held_out: int) -> None:
    losses = [row["loss"] for row in steps if "loss" in row]
    last = losses[-max(1, len(losses) // 10) :]
    print(f"{out}: {pairs} pairs, loss of the last tenth {sum(last) / len(last):.4f}")
    if held_out:
        epochs = [row for row in steps if "held_out_loss" in row]
        best = min(epochs, key=lambda row: row["held_out_loss"])
        accuracy = "-" if best["held_out_accuracy"] is None else f"{best['held_out_accuracy']:.3f}"
        found = f"loss {best['held_out_loss']:.4f}, accuracy {accuracy}, of epoch {best['epoch']}"
        print(f"{held_out} held-out pairs: {found}")


def learning_curves(steps: list[dict]):
    """Loss against pairs seen: of the training batches, smoothed, and on the held-out pairs."""
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    batches = [row for row in steps if "loss" in row]
    if batches:
        seen = [row["pairs_seen"] for row in batches]
        losses = [row["loss"] for row in batches]
        span = max(1, len(losses) // 20)
        recent = [losses[max(0, i - span) : i] for i in range(1, len(losses) + 1)]
        smooth = [sum(row) / len(row) for row in recent]
        axes.plot(seen, losses, color=SKY, linewidth=0.5, alpha=0.5)
        axes.plot(seen, smooth, color=BLUE, label=f"training, mean of {span} batches")

    held_out = [row for row in steps if "held_out_loss" in row]
    if held_out:
        seen = [row["pairs_seen"] for row in held_out]
        losses = [row["held_out_loss"] for row in held_out]
        axes.plot(seen, losses, "o-", color=ORANGE, label="held-out pairs, after an epoch")

    axes.axhline(0.6931, color=GREY, linewidth=0.8, linestyle="--", label="chance")
    axes.set(xlabel="pairs seen", ylabel="cross-entropy (nats a pair)", ylim=(0, None))
    axes.set_title("Training of the judge")
    axes.legend(frameon=False)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a PreferenceModel from pairs")
    command.add_argument("--pairs", required=True, help="JSON lines of prompt, chosen, rejected")
    command.add_argument("--backbone", required=True, help="the checkpoint folder to start from")
    command.add_argument("--out", required=True, help="new folder for the judge")
    add_flags(command, JudgeConfig)
    args = parser.parse_args(arguments)
    stopped = "stopped; the same command continues after the last saved step"
    inputs = (args.pairs, args.backbone)
    return exit_code("prefmodel.py", lambda: train(args), stopped, args.out, inputs)


if __name__ == "__main__":
    sys.exit(main())

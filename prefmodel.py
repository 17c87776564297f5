"""Judges: P(y_i beats y_j | x) for K responses to a prompt.

A judge has `preferences(prompt: str, responses: list[str]) -> (K, K)` and the batched
`preferences_many(prompts, responses) -> (N, K, K)`: float32, entry [i, j] = P(response i beats response j),
P + Pᵀ = 1, ½ on the diagonal (a response ties with itself). `load_judge` finds one from a command line:
a checkpoint folder, or `module:function` for a rule, an API or a person.

    python prefmodel.py train --pairs pairs.jsonl --backbone DIR --out DIR     train a PreferenceModel from pairs
    python prefmodel.py report --judge SPEC --pairs pairs.jsonl --out DIR      what a judge is worth on held-out pairs
    python train.py --judge prefmodel:human ...                               be the judge yourself
"""

import argparse
import importlib
import inspect
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import judge_report
from command import exit_code
from data import TEMPLATES, Tokenizer, new_figure, pad, read_json, read_pairs, vacant, whole
from data import write_figure, write_json, write_lines
from human import Human as human  # noqa: F401  --judge prefmodel:human
from judge_report import checked_tables
from model import DTYPES, Decoder, ModelConfig, check_device, initialize, load_pretrained, load_weights, save_checkpoint
from pairrm import PairRM


class Rule:
    """A judge from a function (prompt, responses) -> K × K numbers."""

    def __init__(self, function, **arguments):
        self.function, self.arguments = function, arguments

    def preferences(self, prompt, responses):
        table, K = self.function(prompt, responses, **self.arguments), len(responses)
        try:
            table = torch.as_tensor(table, dtype=torch.float32).detach().cpu()
        except (TypeError, ValueError):
            table = torch.empty(0)
        if table.shape != (K, K):
            name = getattr(self.function, "__qualname__", self.function)
            found = tuple(table.shape)
            raise ValueError(f"judge {name}: expected a {K} × {K} table for prompt {prompt[:40]!r}, found shape {found}")
        return table

    def preferences_many(self, prompts, responses):
        return torch.stack([self.preferences(*row) for row in zip(prompts, responses, strict=True)])


class Ensemble:
    """The weighted mean of several judges' probabilities; weights are scaled to sum to 1.

    Also the way to balance several goals: a helpfulness judge beside a rule about length, each with its weight.
    On a command line: 'prefmodel:Ensemble:{"judges": ["DIR", "module:rule"], "weights": [0.8, 0.2]}'.
    """

    def __init__(self, judges, weights=None, device=None, dtype=None):
        if isinstance(judges, str) or not all(isinstance(j, str) or hasattr(j, "preferences_many") for j in judges):
            raise ValueError(f"ensemble: judges are {judges!r}, expected a list of checkpoint folders and module:function")
        self.judges = [load_judge(judge, device, dtype) if isinstance(judge, str) else judge for judge in judges]
        weights = [1.0] * len(self.judges) if weights is None else weights
        if len(weights) != len(self.judges) or not all(weight >= 0 for weight in weights) or not sum(weights) > 0:
            raise ValueError(f"ensemble: weights are {weights}, expected one of 0 or more for each of {len(self.judges)} judges")
        self.weights = torch.tensor(weights) / sum(weights)

    def members_many(self, prompts, responses):
        """(M, N, K, K): each judge's own tables."""
        return torch.stack([checked_tables(judge, prompts, responses, "of the ensemble") for judge in self.judges])

    def mean_and_disagreement(self, prompts, responses):
        """(N, K, K) weighted mean of the judges' probabilities, and their standard deviation: 0 where all say the same."""
        members = self.members_many(prompts, responses)
        mean = torch.einsum("m,mnij->nij", self.weights, members)
        return mean, torch.einsum("m,mnij->nij", self.weights, (members - mean) ** 2).sqrt()

    def preferences_many(self, prompts, responses):
        return self.mean_and_disagreement(prompts, responses)[0]

    def preferences(self, prompt, responses):
        return self.preferences_many([prompt], [responses])[0]

    def disagreement(self, prompts, responses):
        return self.mean_and_disagreement(prompts, responses)[1]


class Transitive:
    """What the authors' code makes of a judge (uclaml/SPPO, rank.py and compute_prob.py): P = σ(score_i - score_j).

    score_i = mean_j (L_ij - L_ji) over all K, itself included. It keeps K numbers of the K × K table, so no circle survives, and
    doubles the logits of a transitive judge. For comparison: 'prefmodel:Transitive:{"judge": "DIR"}'.
    """

    def __init__(self, judge, device=None, dtype=None):
        self.judge = load_judge(judge, device, dtype) if isinstance(judge, str) else judge

    def preferences_many(self, prompts, responses):
        if hasattr(self.judge, "logits_many"):
            logits = self.judge.logits_many(prompts, responses)
        else:
            logits = torch.logit(checked_tables(self.judge, prompts, responses, "to be made transitive"), eps=1e-7)
        return transitive(logits)

    def preferences(self, prompt, responses):
        return self.preferences_many([prompt], [responses])[0]


def transitive(logits, policy=None):
    """(..., K, K) logits of P(i beats j) in either order -> (..., K, K) probabilities from mean scores alone.

    The mean is over opponents from policy (..., K); without one, over the K samples.
    """
    both = logits - logits.mT
    score = both.mean(-1) if policy is None else (both * policy[..., None, :]).sum(-1)
    return torch.sigmoid(score[..., :, None] - score[..., None, :])


class PreferenceModel(nn.Module):
    """A transformer that reads prompt and response once and gives a scalar r and a cyclic vector v of size 2k.

    logit P(i beats j) = r_i - r_j + Σ_l (v_i[2l] v_j[2l+1] - v_i[2l+1] v_j[2l])

    Skew-symmetric by construction, one forward pass a response. cyclic = k = 0 is Bradley–Terry, scalar = False is
    the General Preference Model (2410.02197, Def. 4.3, without its unit norm), both together the hybrid of
    2605.17342. A text longer than the model's context is cut at the end of the response.
    """

    def __init__(self, config, scalar=True, cyclic=2, template="plain"):
        super().__init__()
        if not scalar and not cyclic:
            raise ValueError("a preference model needs a scalar head or a cyclic head of k > 0")
        self.config, self.template = config, template
        self.model = Decoder(config)
        self.scalar_head = nn.Linear(config.hidden_size, 1, bias=False) if scalar else None
        self.cyclic_head = nn.Linear(config.hidden_size, 2 * cyclic, bias=False) if cyclic else None
        self.tokenizer = None

    def forward(self, tokens, lengths):
        """Right-padded (B, T), (B,) -> r (B,), v (B, 2k) in float32, read off the last token; zeros for an absent head."""
        last = self.model(tokens)[torch.arange(len(tokens), device=tokens.device), lengths - 1]  # (B, D)
        r = self.scalar_head(last)[:, 0] if self.scalar_head is not None else last.new_zeros(len(last))
        v = self.cyclic_head(last) if self.cyclic_head is not None else last.new_zeros(len(last), 0)
        return r.float(), v.float()

    def read(self, texts):
        """(prompt, response) pairs -> r, v, with gradients."""
        rows = [self.cut(self.tokenizer.judged_ids(*text, self.template), text[0]) for text in texts]
        device = self.model.embed_tokens.weight.device
        return self(pad(rows, device), torch.tensor([len(row) for row in rows], device=device))

    def cut(self, ids, prompt):
        context = self.config.max_position_embeddings
        if len(ids) <= context:
            return ids
        if len(self.tokenizer.prompt_ids(prompt, self.template)) + 2 > context:
            raise ValueError(f"judge: prompt {prompt[:40]!r} leaves no room for a response in its context of {context} tokens")
        return ids[: context - 1] + [self.tokenizer.eos]

    def preferences(self, prompt, responses):
        return self.preferences_many([prompt], [responses])[0]

    @torch.no_grad()
    def preferences_many(self, prompts, responses, rows=64):
        """N prompts, N lists of K responses -> (N, K, K): N × K forward rows, `rows` at a time, similar lengths together."""
        N, K = len(prompts), len(responses[0])
        texts = [(prompt, text) for prompt, row in zip(prompts, responses, strict=True) for text in row]
        order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]) + len(texts[i][1]))
        scalars, vectors = [None] * len(texts), [None] * len(texts)
        for start in range(0, len(order), rows):
            chunk = order[start : start + rows]
            for i, r, v in zip(chunk, *self.read([texts[i] for i in chunk])):
                scalars[i], vectors[i] = r, v
        logits = preference_logits(torch.stack(scalars).view(N, K), torch.stack(vectors).view(N, K, -1))
        return torch.sigmoid(logits).cpu()

    @classmethod
    def from_pretrained(cls, folder, dtype=None, device=None):
        """Read a judge folder: a checkpoint whose config.json has `preference_head`, and its tokenizer."""
        path = Path(folder) / "config.json"
        head = read_json(path).get("preference_head")
        if not isinstance(head, dict) or head.keys() != {"scalar", "cyclic", "template"}:
            found = "nothing" if head is None else json.dumps(head)
            raise ValueError(f"{path}: preference_head is {found}, expected a judge as `prefmodel.py train` writes it")
        judge = load_pretrained(cls, ModelConfig.from_json(path), folder, dtype, device, **head)
        judge.tokenizer = Tokenizer(folder)
        judge.tokenizer.check_vocabulary(judge.config.vocab_size)
        return judge

    @classmethod
    def from_backbone(cls, folder, generator, device=None, pretrained=True, dtype=None, **head):
        """Put fresh heads on the transformer of a checkpoint folder (pretrained=False: on one of its shape)."""
        config = ModelConfig.from_json(Path(folder) / "config.json")
        judge = initialize(cls(config, **head), generator).to(device, DTYPES[dtype or "float32"])
        if pretrained:
            load_weights(judge.model, folder, unused=("lm_head.",), prefix="model.")
        judge.tokenizer = Tokenizer(folder)
        judge.tokenizer.check_vocabulary(judge.config.vocab_size)
        return judge

    def save_pretrained(self, folder):
        head = {
            "scalar": self.scalar_head is not None,
            "cyclic": 0 if self.cyclic_head is None else self.cyclic_head.out_features // 2,
            "template": self.template,
        }
        with whole(folder) as temporary:
            save_checkpoint(self, temporary, {"architectures": ["PreferenceModel"], "preference_head": head})
            self.tokenizer.copy_to(temporary)


def preference_logits(r, v):
    """r (..., K), v (..., K, 2k) -> (..., K, K) logits of P(i beats j), exactly skew-symmetric."""
    half = v[..., 0::2] @ v[..., 1::2].transpose(-1, -2)  # Σ_l v_i[2l] v_j[2l+1]
    return r[..., :, None] - r[..., None, :] + half - half.transpose(-1, -2)


def train_preference_model(judge, pairs, epochs, lr, batch, generator, progress=None, held_out=(), patience=None):
    """Fit P(chosen beats rejected) to each pair's probability by cross-entropy. Returns a dictionary of numbers a step.

    Hard labels are probabilities of 1; shares of votes are soft labels. AdamW; the learning rate
    rises over the first tenth of the steps and then falls linearly to 0. With `held_out` pairs there is one more dictionary an
    epoch, the judge ends with the weights of its best epoch on them, and stops `patience` epochs behind it.
    """
    rows, total, best, step, seen = [], epochs * -(-len(pairs) // batch), None, 0, 0
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    for epoch in range(1, epochs + 1):
        for indices in torch.randperm(len(pairs), generator=generator).split(batch):
            chunk = [pairs[i] for i in indices.tolist()]
            loss, accuracy = judge_pairs(judge, chunk)
            loss.backward()
            now = lr * min((step + 1) / (0.1 * total), 1 - step / total)
            for group in optimizer.param_groups:
                group["lr"] = now
            norm = torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            if not torch.isfinite(norm):
                raise ValueError(f"step {step + 1}: the gradient norm is {norm.item()}; lower --lr")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step, seen = step + 1, seen + len(chunk)
            rows.append({"step": step, "epoch": epoch, "pairs_seen": seen, "loss": loss.item(), "accuracy": accuracy, "lr": now})
            if progress is not None:
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update(len(chunk))
        if held_out:
            row = {"epoch": epoch, "pairs_seen": seen} | evaluate_pairs(judge, held_out, batch)
            rows.append(row)
            if best is None or row["held_out_loss"] < best["held_out_loss"]:
                best, weights = row, {name: value.detach().clone() for name, value in judge.state_dict().items()}
            if patience is not None and epoch - best["epoch"] >= patience:
                break
    if held_out:
        judge.load_state_dict(weights)
    return rows


def judge_pairs(judge, pairs):
    """Mean cross-entropy of the pairs, differentiable, and accuracy over those with a majority (None without one)."""
    r, v = judge.read([(pair["prompt"], pair[side]) for pair in pairs for side in ("chosen", "rejected")])
    logit = preference_logits(r.view(-1, 2), v.view(len(pairs), 2, -1))[:, 0, 1]  # (b,)
    probability = torch.tensor([pair["probability"] for pair in pairs], device=logit.device)
    decided = probability != 0.5
    right = ((logit > 0) == (probability > 0.5))[decided].float().mean().item() if decided.any() else None
    return F.binary_cross_entropy_with_logits(logit, probability), right


@torch.no_grad()
def evaluate_pairs(judge, pairs, batch):
    """Loss and accuracy on pairs that are not trained on."""
    chunks = [pairs[start : start + batch] for start in range(0, len(pairs), batch)]
    rows = [(len(chunk), *judge_pairs(judge, chunk)) for chunk in chunks]
    scored = [(count, right) for count, _, right in rows if right is not None]
    accuracy = sum(count * right for count, right in scored) / sum(count for count, _ in scored) if scored else None
    return {"held_out_loss": sum(count * loss.item() for count, loss, _ in rows) / len(pairs), "held_out_accuracy": accuracy}


def split_pairs(pairs, share, generator):
    """(training pairs, held-out pairs): about `share` of the prompts, with all their pairs, are held out."""
    prompts = list(dict.fromkeys(pair["prompt"] for pair in pairs))
    order = torch.randperm(len(prompts), generator=generator).tolist()
    if not 0 <= share < 1:
        raise ValueError(f"--held-out is {share}, expected a share from 0 to 1")
    apart = {prompts[i] for i in order[: round(share * len(prompts))]}
    parts = [[pair for pair in pairs if (pair["prompt"] in apart) == held] for held in (False, True)]
    if not all(parts[: 1 + (share > 0)]):
        raise ValueError(f"--held-out {share}: of {len(prompts)} prompts, none would be left on one side")
    return parts


def split_spec(spec):
    """'module:function:{"key": value}' -> module, function, its keyword arguments."""
    module, _, rest = spec.partition(":")
    name, _, arguments = rest.partition(":")
    if not module or not name:
        raise FileNotFoundError(f"judge {spec}: no such folder, and not of the form module:function")
    try:
        arguments = json.loads(arguments or "{}")
    except ValueError:
        arguments = None
    if not isinstance(arguments, dict):
        raise ValueError(f"judge {spec}: expected keyword arguments as a JSON object behind the second colon")
    return module, name, arguments


def load_judge(spec, device=None, dtype=None):
    """A judge from a checkpoint folder, or from `module:function`, with keyword arguments as JSON behind a second colon.

    Example: 'toy.text_game:oracle:{"strengths": [0.9, 0.9, 0.8]}'.
    """
    if Path(spec).is_dir():
        published = read_json(Path(spec) / "config.json").get("model_type") == "deberta-v2"
        return (PairRM if published else PreferenceModel).from_pretrained(spec, dtype, device)
    module, name, arguments = split_spec(spec)
    sys.path.insert(0, "")  # a user's module stands in the folder that the command is called from
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, SyntaxError) as error:
        raise ValueError(f"judge {spec}: {error}") from None
    finally:
        sys.path.remove("")
    if isinstance(found, type):
        wanted = inspect.signature(found).parameters
        places = {name: value for name, value in (("device", device), ("dtype", dtype)) if name in wanted}
        try:
            found, arguments = found(**(places | arguments)), {}
        except TypeError as error:
            raise ValueError(f"judge {spec}: {error}") from None
    if hasattr(found, "preferences_many"):
        return found
    found = getattr(found, "preferences", found)
    try:
        inspect.signature(found).bind("prompt", ["response"], **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"judge {spec}: cannot be called with a prompt, a list of responses and {arguments}: {error}") from None
    return Rule(found, **arguments)


# ------------------------------------------------------------------------------------------------ command line


def train(args):
    check_device(args.device)
    vacant(args.out)  # before hours of training, not after
    if args.patience and not args.held_out:
        raise ValueError("--patience needs --held-out: there is nothing to be patient about")
    pairs, generator = read_pairs(args.pairs), torch.Generator().manual_seed(args.seed)
    pairs, held_out = split_pairs(pairs, args.held_out, generator)
    head = {"scalar": args.scalar, "cyclic": args.cyclic, "template": args.template}
    judge = PreferenceModel.from_backbone(args.backbone, generator, args.device, not args.from_scratch, args.dtype, **head)
    with tqdm(total=args.epochs * len(pairs), unit="pair", desc="train judge") as progress:
        steps = train_preference_model(
            judge, pairs, args.epochs, args.lr, args.batch, generator, progress, held_out, args.patience
        )  # fmt: skip
    judge.save_pretrained(args.out)
    write_lines(Path(args.out) / "metrics.jsonl", steps)
    write_figure(Path(args.out) / "learning.png", learning_curves(steps))
    losses = [row["loss"] for row in steps if "loss" in row]
    last = losses[-max(1, len(losses) // 10) :]
    print(f"{args.out}: {len(pairs)} pairs, loss of the last tenth {sum(last) / len(last):.4f}")
    if held_out:
        best = min((row for row in steps if "held_out_loss" in row), key=lambda row: row["held_out_loss"])
        accuracy = "-" if best["held_out_accuracy"] is None else f"{best['held_out_accuracy']:.3f}"
        print(f"{len(held_out)} held-out pairs: loss {best['held_out_loss']:.4f}, accuracy {accuracy}, of epoch {best['epoch']}")


def learning_curves(steps):
    """Loss against pairs seen: of each training batch, and on the held-out pairs behind each epoch."""
    figure = new_figure(6.5, 4.2)
    axes = figure.subplots()
    training, held_out = ([row for row in steps if key in row] for key in ("loss", "held_out_loss"))
    for rows, key, look, name in ((training, "loss", "-", "training batch"), (held_out, "held_out_loss", "o-", "held-out pairs")):
        if rows:
            colour = {"-": "#56B4E9", "o-": "#D55E00"}[look]
            axes.plot([row["pairs_seen"] for row in rows], [row[key] for row in rows], look, color=colour, label=name)
    axes.axhline(0.6931, color="#777777", linewidth=0.8, linestyle="--", label="a coin")
    axes.set(xlabel="pairs seen", ylabel="cross-entropy (nats a pair)", title="Training of the judge", ylim=(0, None))
    axes.legend(frameon=False)
    return figure


def report(args):
    if Path(args.out).is_file():
        raise ValueError(f"--out {args.out}: is a file, expected a folder for report.json and report.png")
    judge, pairs = load_judge(args.judge, args.device), read_pairs(args.pairs)
    result = judge_report.report(judge, pairs, args.judge)
    write_json(Path(args.out) / "report.json", {"judge_spec": args.judge, "pairs_file": args.pairs} | result)
    write_figure(Path(args.out) / "report.png", judge_report.draw(result))
    judge_report.print_report(result)
    print(f"\n{Path(args.out) / 'report.json'}, {Path(args.out) / 'report.png'}")


def at_least(low, kind=int):
    def number(text):
        if not kind(text) >= low:
            raise argparse.ArgumentTypeError(f"{text}, expected at least {low}")
        return kind(text)

    return number


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("train", help="train a PreferenceModel from pairs")
    command.add_argument("--pairs", required=True, help="JSON lines: prompt, chosen, rejected, optional probability")
    command.add_argument("--backbone", required=True, help="checkpoint folder whose transformer and tokenizer the judge gets")
    command.add_argument("--out", required=True, help="folder for the judge")
    command.add_argument("--from-scratch", action="store_true", help="take only the backbone's shape, not its weights")
    command.add_argument("--scalar", action=argparse.BooleanOptionalAction, default=True, help="scalar head (Bradley–Terry part)")
    command.add_argument("--cyclic", type=at_least(0), default=2, metavar="k", help="size of the cyclic head is 2k; 0 for none")
    command.add_argument("--template", choices=TEMPLATES, default="mistral", help="how prompt and response are joined")
    command.add_argument("--epochs", type=at_least(1), default=2)
    command.add_argument("--batch", type=at_least(1), default=32, help="pairs per optimizer step")
    command.add_argument("--lr", type=float, default=3e-4, help="largest learning rate, after a tenth of the steps")
    command.add_argument("--held-out", type=at_least(0, float), default=0.0, metavar="SHARE", help="of the prompts")
    command.add_argument("--patience", type=at_least(1), help="stop so many epochs behind the best on the held-out pairs")
    command.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights")
    command.add_argument("--seed", type=int, default=0)
    command.set_defaults(run=train)
    command = commands.add_parser("report", help="what a judge is worth on labelled pairs")
    command.add_argument("--judge", required=True, help="checkpoint folder, or module:function")
    command.add_argument("--pairs", required=True, help="JSON lines: prompt, chosen, rejected, optional probability and votes")
    command.add_argument("--out", required=True, help="folder for report.json and report.png")
    command.set_defaults(run=report)
    for command in commands.choices.values():
        command.add_argument("--device", default="cpu")
    args = parser.parse_args(arguments)
    return exit_code("prefmodel.py", lambda: args.run(args))


if __name__ == "__main__":
    sys.exit(main())

"""Judges: P(y_i beats y_j | x) for K responses to a prompt.

A judge has `preferences(prompt: str, responses: list[str]) -> (K, K)` and the batched
`preferences_many(prompts, responses) -> (N, K, K)`: float32, entry [i, j] = P(response i beats response j),
P + Pᵀ = 1, ½ on the diagonal (a response ties with itself). `load_judge` finds one from a command line:
a checkpoint folder, or `module:function` for a rule, an API or a person.

    python prefmodel.py train --pairs pairs.jsonl --backbone DIR --out DIR     train a PreferenceModel from pairs
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

from data import TEMPLATES, Tokenizer, pad, read_json, read_pairs, vacant, whole, write_lines
from model import Decoder, ModelConfig, check_device, initialize, load_pretrained, load_weights, save_checkpoint


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
    def from_backbone(cls, folder, generator, device=None, pretrained=True, **head):
        """Put fresh heads on the transformer of a checkpoint folder (pretrained=False: on one of its shape)."""
        config = ModelConfig.from_json(Path(folder) / "config.json")
        judge = initialize(cls(config, **head), generator).to(device)
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


def train_preference_model(judge, pairs, epochs, lr, batch, generator, progress=None):
    """Fit P(chosen beats rejected) to each pair's probability by cross-entropy. Returns a dictionary of numbers a step.

    Hard labels are probabilities of 1; shares of votes are soft labels. AdamW; the learning rate
    rises over the first tenth of the steps and then falls linearly to 0.
    """
    steps, total = [], epochs * -(-len(pairs) // batch)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.0, betas=(0.9, 0.95))
    for _ in range(epochs):
        for indices in torch.randperm(len(pairs), generator=generator).split(batch):
            chunk = [pairs[i] for i in indices.tolist()]
            texts = [(pair["prompt"], pair[side]) for pair in chunk for side in ("chosen", "rejected")]
            r, v = judge.read(texts)
            logit = preference_logits(r.view(-1, 2), v.view(len(chunk), 2, -1))[:, 0, 1]  # (b,)
            probability = torch.tensor([pair["probability"] for pair in chunk], device=logit.device)
            loss = F.binary_cross_entropy_with_logits(logit, probability)
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr * min((len(steps) + 1) / (0.1 * total), 1 - len(steps) / total)
            torch.nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decided = probability != 0.5
            right = ((logit > 0) == (probability > 0.5))[decided].float().mean().item() if decided.any() else None
            steps.append({"step": len(steps) + 1, "loss": loss.item(), "accuracy": right})
            if progress is not None:
                progress.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
                progress.update(len(chunk))
    return steps


def load_judge(spec, device=None, dtype=None):
    """A judge from a checkpoint folder, or from `module:function`, with keyword arguments as JSON behind a second colon.

    Example: 'toy.text_game:oracle:{"strengths": [0.9, 0.9, 0.8]}'.
    """
    if Path(spec).is_dir():
        return PreferenceModel.from_pretrained(spec, dtype, device)
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
    sys.path.insert(0, "")  # a user's module stands in the folder that the command is called from
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"judge {spec}: {error}") from None
    finally:
        sys.path.remove("")
    if isinstance(found, type):
        found, arguments = found(**arguments), {}
    if hasattr(found, "preferences_many"):
        return found
    found = getattr(found, "preferences", found)
    try:
        inspect.signature(found).bind("prompt", ["response"], **arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"judge {spec}: cannot be called with a prompt, a list of responses and {arguments}: {error}") from None
    return Rule(found, **arguments)


# ------------------------------------------------------------------------------------------------ command line


def at_least(low):
    def integer(text):
        if int(text) < low:
            raise argparse.ArgumentTypeError(f"{text}, expected at least {low}")
        return int(text)

    return integer


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    command = parser.add_subparsers(dest="command", required=True).add_parser("train", help="train a PreferenceModel from pairs")
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
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default="cpu")
    args = parser.parse_args()
    try:
        check_device(args.device)
        vacant(args.out)  # before hours of training, not after
        pairs, generator = read_pairs(args.pairs), torch.Generator().manual_seed(args.seed)
        head = {"scalar": args.scalar, "cyclic": args.cyclic, "template": args.template}
        judge = PreferenceModel.from_backbone(args.backbone, generator, args.device, not args.from_scratch, **head)
        with tqdm(total=args.epochs * len(pairs), unit="pair", desc="train judge") as progress:
            steps = train_preference_model(judge, pairs, args.epochs, args.lr, args.batch, generator, progress)
        judge.save_pretrained(args.out)
        write_lines(Path(args.out) / "metrics.jsonl", steps)
    except (ValueError, OSError) as error:
        print(f"prefmodel.py: {error}", file=sys.stderr)
        return 2
    last = steps[-max(1, len(steps) // 10) :]
    print(f"{args.out}: {len(pairs)} pairs, loss of the last tenth {sum(s['loss'] for s in last) / len(last):.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

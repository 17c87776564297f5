"""One round as a person can follow it: the numbers of its first prompt on one screen (--trace).

sppo_round plays a `TracedGame`, whose `report` prints what it has seen. The numbers are the round's
own; only the log π of each response, before the fit and after it, is computed for this.
"""

import torch
from torch import Tensor

from engine.terminal import printable

SHOWN = 8  # responses; of more, those that win most and least
OUTSIDE = 4  # opponents from outside


class TracedGame:
    """A RecordedGame that keeps what its round does to the first prompt."""

    def __init__(self, game):
        self.recorded = game
        self.game = game.game
        self.config = game.config
        # Not seen here; bound, so that a debugger's step into one of them goes straight there.
        for name in ("sample", "score", "previous", "reference"):
            setattr(self, name, getattr(game, name))

    def judge(self, prompts, responses):
        preference = self.recorded.judge(prompts, responses)
        self.prompt = prompts[0]
        self.responses = responses[0]
        self.preference = preference[0]  # (K, K), or more with outside opponents
        return preference

    def fit(self, data, config, generator):
        self.logp = data.logp[0]  # (S,), of those that are trained
        # The same lists, not equal ones: two responses may have the same tokens.
        places = {id(response): k for k, response in enumerate(self.responses)}
        self.chosen = [places[id(response)] for response in data.responses[0]]

        self.before = self.logps()
        steps = self.recorded.fit(data, config, generator)
        self.after = self.logps()
        return steps

    @torch.no_grad()
    def logps(self) -> Tensor:
        """(K,) log π(y|x) under the current policy."""
        # One response at a time: this never needs more memory than the fit.
        return torch.cat([self.game.logps([self.prompt], [[y]])[0] for y in self.responses])

    def report(self, result: dict, row_losses) -> str:
        """At most 40 lines of 100 columns about `result`, what sppo_round has returned.

        row_losses (1, S), (1, S), config -> (1, S) or (1,): the loss that the round has minimised.
        """
        win_rate = result["win_rate"][0]  # (K,)
        shown = extremes(win_rate)
        lines = [f"round {self.game.number}, prompt {cut(printable(self.prompt.text), 70)!r}"]
        lines += ["", *self.sampled(shown)]
        lines += ["", *self.judged(win_rate, shown)]
        lines += ["", *self.regressed(result["target"][:1], row_losses, shown)]
        return "\n".join(lines)

    def sampled(self, shown: list[int]) -> list[str]:
        """Line 3: text, token ids and log π_t of each response."""
        K = len(self.responses)
        now = f"π_{self.game.number}"
        texts = self.game.texts(self.prompt, self.responses)
        some = "" if len(shown) == K else f"; {len(shown)} of them are shown"
        lines = [f"sample: {K} responses from {now}{some}"]
        lines.append(f"{'':6}{'log ' + now:>10}{'tokens':>8}  {'text':36}  token ids")
        for k in shown:
            y = self.responses[k]
            text = cut(repr(printable(texts[k])), 36)
            row = f"{self.before[k]:>10.3f}{len(y):>8}  {text:36}  {cut(' '.join(map(str, y)), 34)}"
            lines.append(f"  y{k + 1:<3}{row}")
        return lines

    def judged(self, win_rate: Tensor, shown: list[int]) -> list[str]:
        """Line 4 and §5.1: who beats whom, and the mean of each row."""
        K = len(self.responses)
        outside = range(K, min(len(self.preference), K + OUTSIDE))
        names = [f"y{k + 1}" for k in shown] + [f"o{k - K + 1}" for k in outside]
        others = f"; {len(self.preference) - K} opponents from outside" if outside else ""
        lines = [f"judge: P(row beats column), and the mean of the row{others}"]
        lines.append(f"{'':6}" + "".join(f"{one:>6}" for one in names) + f"{'win rate':>12}")

        for k in shown:
            row = "".join(f"{self.preference[k, j]:>6.2f}" for j in [*shown, *outside])
            lines.append(f"  y{k + 1:<3}{row}{win_rate[k]:>12.3f}")
        lines.append(f"  {f'mean of all {K}':{4 + 6 * len(names)}}{win_rate.mean():>12.3f}")
        return lines

    def regressed(self, target: Tensor, row_losses, shown: list[int]) -> list[str]:
        """Lines 5 and 6: which responses are trained, their targets, and how far the fit came."""
        config = self.config
        reached = self.after - self.before  # (K,)
        trained = (self.after[self.chosen] - self.logp)[None]  # (1, S), against the round's log π_t
        before = row_losses(torch.zeros_like(trained), target, config)[0]
        after = row_losses(trained, target, config)[0]

        ratio = f"log π_{self.game.number + 1}/π_{self.game.number}"
        lines = [f"regress: {ratio} on the target, η = {config.eta:g}, loss {config.loss}"]
        lines.append(
            f"{'':6}{'trained':14}{'target':>12}{ratio:>16}{'loss before':>14}{'after':>12}"
        )
        roles = ("winner", "loser") if config.select == "best-worst" else ["yes"] * len(self.chosen)
        for k in shown:
            # Where all responses tie, one is winner and loser.
            rows = [s for s, chosen in enumerate(self.chosen) if chosen == k]
            role = ", ".join(roles[s] for s in rows) or "no"
            # A loss that compares winner and loser has no targets, and is one number for both.
            aimed = rows and before.dim()
            aim = f"{target[0, rows[0]]:+.4g}" if aimed else ""
            loss = f"{before[rows[0]]:>14.4g}{after[rows[0]]:>12.4g}" if aimed else ""
            lines.append(f"  y{k + 1:<3}{role:14}{aim:>12}{reached[k]:>+16.4g}{loss}")
        lines.append(f"  {'mean of the trained':46}{before.mean():>14.4g}{after.mean():>12.4g}")
        return lines


def extremes(win_rate: Tensor) -> list[int]:
    """Which responses are shown: all, or the first ones from the top and from the bottom."""
    if len(win_rate) <= SHOWN:
        return list(range(len(win_rate)))
    ends = [side.argsort(stable=True)[: SHOWN // 2] for side in (win_rate, -win_rate)]
    return sorted(set(torch.cat(ends).tolist()))


def cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"

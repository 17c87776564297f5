"""What the numbers of a round say about its settings, for somebody whose run learns nothing, or too
much, and prints like success.
"""

from engine.run_folder import round_folder

FEW_STEPS = 10
LITTLE = 1e-5  # of learning rates, added up over a round: about as far as a weight can go
GROWN = 10  # times the loss at the first step
FAR = 3  # times the targets' root mean square


def advice(summary: dict, steps: list[dict]) -> dict[str, str]:
    """{kind: sentence} from a line of metrics.jsonl for a round, and those of its steps."""
    found = {}
    moved = sum(step["lr"] for step in steps)
    if len(steps) < FEW_STEPS and moved < LITTLE:
        count = f"{len(steps)} optimizer step" + "s" * (len(steps) > 1)
        remedy = "more prompts, a smaller --batch, a larger --lr, or --preset small"
        found["steps"] = f"{count} of {moved:.1g} in all train next to nothing: {remedy}"

    if summary["best_win_rate"] == summary["worst_win_rate"]:
        found["ties"] = "the judge calls every pair a tie: there is nothing to learn"

    if summary["stopped"] == 0:
        remedy = "raise --max-new-tokens; or is --template not the policy's?"
        found["stopped"] = f"no response stopped by itself: {remedy}"

    if summary["last_loss"] > GROWN * max(summary["first_loss"], summary["mean_squared_target"]):
        losses = f"{summary['first_loss']:.4g} to {summary['last_loss']:.4g}"
        found["loss"] = f"the loss grew from {losses}: lower --lr"

    # Of the last quarter of the steps, where they should be nearest.
    last = steps[-(len(steps) // 4 + 1) :]
    best, worst = (
        sum(step[f"{which}_log_ratio"] for step in last) / len(last) for which in ("best", "worst")
    )
    range_ = FAR * summary["mean_squared_target"] ** 0.5
    if max(abs(best), abs(worst)) > max(range_, 1):
        ratios = f"log-ratios of {best:+.1f} (winners) and {worst:+.1f} (losers)"
        beyond = f"are outside of what the targets ask for, ±{range_ / FAR:.2g}"
        found["range"] = f"{ratios} {beyond}: lower --lr or --epochs"
    return found


def written(out: str, rounds: int) -> str:
    """What a finished run has left, for its last line."""
    last = round_folder(out, rounds) / "policy"
    return f"{out}: metrics.jsonl, timings.jsonl, curves.png; the last policy is {last}"

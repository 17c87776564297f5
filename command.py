"""What every command does when it cannot go on: one sentence, and an exit code instead of a traceback."""

import sys


def exit_code(name, work, stopped="stopped"):
    """Call `work`. 0; or 2 where something that a user gave was wrong or a file failed; or 130 after Ctrl-C."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 130
    return 0

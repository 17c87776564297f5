"""Attacks on every command: broken inputs, judges, disks, settings, kills, company. What is not clean is a fault.

    python -m tests.attack                              all cases, a table, 1 if one of them is not clean
    python -m tests.attack --class kills --case 17      one case again
    python -m tests.attack --share 0.05 --seed 3        fewer of them, others

*Clean* is: exit code 0 and a right result, or exit code 2 and one sentence. Never a traceback, a number that is not finite, a
file that was there before and is another now, or a temporary file that stays; and whoever was interrupted comes to the same bytes
when the same command is given again. Each case draws from a seed of its own, so it can be repeated alone.
"""

"""The machinery: run folders, checkpoints, processes, optimizers, files, figures, commands."""

"""``python -m megatron_lowbit COMMAND ...``: see `megatron_lowbit.commands`."""

from megatron_lowbit.commands import main

if __name__ == "__main__":  # processes that a command spawns import this module, too
    main()

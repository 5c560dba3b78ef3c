"""``python -m kdrun``, as ``torchrun -m kdrun`` and ``accelerate launch -m kdrun`` start it."""

from kdrun.cli import main

main()

"""``python -m dgpo_plugin``: the ``dgpo`` command, in the form that ``accelerate launch -m`` starts."""

from dgpo_plugin.commands.main import main

main(prog_name="dgpo")

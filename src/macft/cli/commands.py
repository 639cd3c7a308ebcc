"""The commands of macft: each is a module at the top of the package, with ``main(argv)``."""

from __future__ import annotations

COMMANDS = {
    "train": "fine-tune a model, on this machine or on several",
    "plan": "predict memory and time of a run, without starting it",
    "monitor": "show a run live",
    "generate": "ask the tuned model a question, or chat with it",
    "evaluate": "compare the base model with the tuned one on held-out rows",
    "fuse": "merge the adapter into its base model, for other programs",
    "adapter": "convert an adapter to or from the format of Hugging Face's PEFT",
    "doctor": "check that this machine, or each host of a topology, is ready to train",
    "cluster": "set up a cluster of machines; list or remove clusters",
    "keys": "show this machine's key, and manage the machines it trusts",
    "bench": "measure all-reduce speed between the machines of a topology",
}
"""Name and description, in the order in which ``macft`` lists them."""

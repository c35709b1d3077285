"""Prompts: files and sets of them by name, and the order that a run draws them in."""

from dgpo_plugin.common.prompt import Prompt
from dgpo_plugin.prompts.files import read_prompts
from dgpo_plugin.prompts.registry import load_prompts, prompt_set_names

__all__ = ["Prompt", "load_prompts", "prompt_set_names", "read_prompts"]

"""Another package, as its users would write it: one file for each thing that it adds, and its entry points.

Nothing here is imported by the tests; :func:`install` writes it where a program's ``PYTHONPATH`` may point.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from dgpo_plugin.models.load import world_pipeline

ALGORITHM = Path(__file__).parents[1] / "examples" / "my_algorithm.py"

REWARD = """
def redness(images, prompts):
    red, green, blue = images.mean((2, 3)).unbind(1)
    return red - (green + blue) / 2
"""

PROMPTS = """
from dgpo_plugin import Prompt

def prompts():
    return [Prompt("a red circle"), Prompt("two blue squares")]
"""

FAMILY = '''
from dgpo_plugin.models.families.sd3 import SD3Model

class OutsideModel(SD3Model):
    """A pipeline of their own class, which is Stable Diffusion 3's in all but its name."""
'''

WORLD = """
from pathlib import Path

from dgpo_plugin import Prompt
from dgpo_plugin.common.names import World

def train_prompts():
    return [Prompt("a green triangle"), Prompt("a yellow square")]

class Greenness:
    def __call__(self, images, prompts):
        return images[:, 1].mean((1, 2))

def pretrain(output, seed, iterations, compile_model):
    output.mkdir(parents=True)
    (output / "made.txt").write_text(f"seed {seed}")

WORLD = World(
    pipeline=str(Path(__file__).with_name("pipeline")),
    prompt_sets={"train": train_prompts},
    reward=Greenness,
    about_reward="how green it is",
    pretrain=pretrain,
)
"""

ENTRY_POINTS = """
[dgpo_plugin.algorithms]
reward-weighted = outside_algorithm:RewardWeighted
[dgpo_plugin.rewards]
redness = outside_reward:redness
[dgpo_plugin.model_families]
OutsidePipeline = outside_family:OutsideModel
[dgpo_plugin.prompt_sets]
outside/pairs = outside_prompts:prompts
[dgpo_plugin.worlds]
outside = outside_world:WORLD
"""


def install(folder: Path, entry_points: str = ENTRY_POINTS, **files: str) -> dict[str, str]:
    """Write the package, or ``files`` in its place, and return the environment in which Python finds it."""
    contents = files or {
        "outside_algorithm": ALGORITHM.read_text(encoding="utf-8"),
        "outside_reward": REWARD,
        "outside_family": FAMILY,
        "outside_prompts": PROMPTS,
        "outside_world": WORLD,
    }
    for name, text in contents.items():
        (folder / f"{name}.py").write_text(text, encoding="utf-8")
    if not files:
        shutil.copytree(world_pipeline("shapes"), folder / "pipeline")
        index = folder / "pipeline" / "model_index.json"
        index.write_text(json.dumps({**json.loads(index.read_text()), "_class_name": "OutsidePipeline"}))
    about = folder / "outside-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)
    return {"PYTHONPATH": str(folder)}

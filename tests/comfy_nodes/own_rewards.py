"""A user's own rewards, as they lie in models/dgpo_rewards."""

import logging

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from dgpo_plugin.rewards import Reward


def brightness(images, prompts):
    return images.mean((1, 2, 3))


class Neural(Reward):
    """Brightness by a network, like a neural reward of the library: ``network``, and ``device`` that callers set."""

    def __init__(self):
        logging.info("own rewards: network made")
        self.network = BrightnessNet()
        self.device = torch.device("cpu")

    def __call__(self, images, prompts):
        self.network.to(self.device)
        with torch.no_grad():
            return self.network(images.to(self.device))


class Scaled:
    """With an option."""

    def __init__(self, config, factor=1.0):
        self.factor, self.batch_size = factor, config.batch_size

    def __call__(self, images, prompts):
        return self.factor * images.mean((1, 2, 3)) + self.batch_size


class BrightnessNet(PreTrainedModel):
    """Of transformers' class, whose ``device`` cannot be set, as the networks of neural rewards are."""

    def __init__(self):
        super().__init__(PretrainedConfig())
        self.weigh = nn.Linear(3, 1, bias=False)
        nn.init.constant_(self.weigh.weight, 1 / 3)

    def forward(self, images):
        return self.weigh(images.mean((2, 3)))[:, 0]


def slow(images, prompts):
    import time

    time.sleep(30)
    return images.mean((1, 2, 3))


class SlowLater(Reward):
    """Quick for the base's evaluation and the first iteration, then slow."""

    title = "brightness, later slowly"

    def __init__(self):
        self.calls = 0

    def __call__(self, images, prompts):
        self.calls += 1
        return brightness(images, prompts) if self.calls <= 2 else slow(images, prompts)


def broken(images, prompts):
    return images.mean((1, 2, 3)) / 0

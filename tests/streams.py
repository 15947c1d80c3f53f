"""Models of a user's own, in which the residual stream stands where it stands in real ones."""

import torch
from torch import nn

WIDTH = 8


class Block(nn.Module):
    """Pre-norm: z + mlp(norm(z))."""

    def __init__(self, width=WIDTH):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, z):
        return z + self.mlp(self.norm(z))


class PostNorm(Block):
    def forward(self, z):
        return self.norm(z + self.mlp(z))


class InPlace(Block):
    def forward(self, z):
        z += self.mlp(z)
        return z


class Keyword(Block):
    def forward(self, mask=None, stream=None):
        return {"gate": mask, "stream": stream + self.mlp(self.norm(stream))}


class Paired(Block):
    """The stream second, in a pair, in and out."""

    def forward(self, pair):
        side, z = pair
        return [side, z + self.mlp(self.norm(z))]


class Chain(Block):
    """Not residual."""

    def forward(self, z):
        return self.mlp(self.norm(z))


class Gated(Block):
    """A highway: what entered is weighed by itself, entry by entry."""

    def forward(self, z):
        gate = torch.sigmoid(self.mlp(z))
        return gate * z + (1 - gate) * self.norm(z)


class Negative(Block):
    def forward(self, z):
        return self.mlp(z) - z


class Detached(Block):
    """What is added does not depend on what entered."""

    def __init__(self, width=WIDTH):
        super().__init__(width)
        self.offset = nn.Parameter(torch.ones(width))

    def forward(self, z):
        return z + self.offset


class Model(nn.Module):
    """Ids, blocks, a head."""

    def __init__(self, block=Block, depth=3):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.body = nn.ModuleList(block() for _ in range(depth))
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, ids):
        z = self.embedding(ids)
        for block in self.body:
            z = self.step(block, z)
        return self.head(z)

    def step(self, block, z):
        return block(z)


class KeywordModel(Model):
    def __init__(self):
        super().__init__(Keyword)

    def step(self, block, z):
        return block(stream=z, mask=torch.ones(3, 3))["stream"]


class PairedModel(Model):
    def __init__(self):
        super().__init__(Paired)

    def step(self, block, z):
        return block((torch.ones(2, 2), z))[1]


class LengthFirst(Model):
    """The batch is the second dimension of the stream."""

    def forward(self, ids):
        z = self.embedding(ids).transpose(0, 1)
        for block in self.body:
            z = block(z)
        return self.head(z.transpose(0, 1))


class Wrapped(nn.Module):
    """A user's model around another one, with two heads."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.heads = nn.ModuleDict({"one": nn.Linear(5, 2), "two": nn.Linear(5, 3)})

    def forward(self, ids):
        z = self.inner(ids)
        return {name: head(z) for name, head in self.heads.items()}


class Towers(nn.Module):
    """Two stacks that meet at the end."""

    def __init__(self, first=3, second=3):
        super().__init__()
        self.embedding = nn.Embedding(11, WIDTH)
        self.left = nn.ModuleList(Block() for _ in range(first))
        self.right = nn.ModuleList(Block() for _ in range(second))

    def forward(self, ids):
        left = right = self.embedding(ids)
        for block in self.left:
            left = block(left)
        for block in self.right:
            right = block(right)
        return (left * right).sum(-1)


class Nested(nn.Module):
    """A block that runs a residual stack of its own on a part of what enters."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Linear(WIDTH, 4), nn.Linear(4, WIDTH)
        self.inner = nn.ModuleList(Block(4) for _ in range(2))

    def forward(self, z):
        x = self.down(z)
        for block in self.inner:
            x = block(x)
        return z + self.up(x)


class ConvBlock(nn.Module):
    """ReLU(z + conv(z)), normalised over the batch."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, z):
        return torch.relu(z + self.norm(self.conv(z)))


class Stage(nn.Module):
    def __init__(self, before, width):
        super().__init__()
        self.down = nn.Conv2d(before, width, 2, 2) if before != width else nn.Identity()
        self.blocks = nn.Sequential(ConvBlock(width), ConvBlock(width))

    def forward(self, z):
        return self.blocks(self.down(z))


class ConvNet(nn.Module):
    """Stages of widths 6, 6 and 10; the first two hand their input on unchanged but for their blocks."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 4, 4)
        self.stages = nn.ModuleList([Stage(6, 6), Stage(6, 6), Stage(6, 10)])
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        z = self.stem(x)
        for stage in self.stages:
            z = stage(z)
        return self.head(z.mean((2, 3)))


class PlainNet(nn.Sequential):
    """Convolutions one after another, as in VGG, of one width."""

    def __init__(self):
        layers = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()) for _ in range(3)]
        super().__init__(nn.Conv2d(3, 6, 3, padding=1), *layers, nn.Flatten(2), nn.AdaptiveAvgPool1d(1))


class Mixed(nn.Module):
    """A convolutional stage, width second, then one of tokens, width last."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 6, 4, 4), nn.ModuleList([ConvBlock(6), ConvBlock(6)])
        self.project, self.tokens = nn.Linear(6, WIDTH), nn.ModuleList([Block(), Block()])

    def forward(self, x):
        z = self.stem(x)
        for block in self.conv:
            z = block(z)
        z = self.project(z.flatten(2).transpose(1, 2))
        for block in self.tokens:
            z = block(z)
        return z.mean(1)

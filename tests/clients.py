"""Modules as other libraries write them. At the top of a file of their own, so that pickle finds them."""

from nets import HIDDEN, IN, OUT
from torch import nn
from torch.nn import functional


class Mlp(nn.Module):
    """Its forward calls its children in order, as in vision transformers."""

    def __init__(self, width, hidden):
        super().__init__()
        self.fc2 = nn.Linear(hidden, width)
        self.fc1 = nn.Linear(width, hidden)
        self.act = Activation()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.drop2 = nn.Dropout(0.0)

    def forward(self, hidden_states):
        x = self.fc1(hidden_states)
        x = self.act(x)
        x = self.drop1(x)
        x = self.norm(x)
        x = self.fc2(x)
        return self.drop2(x)


class Net(nn.Module):
    """Its activations are functions, as in the tutorials."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(IN, HIDDEN[0])
        self.second = nn.Linear(HIDDEN[0], HIDDEN[1])
        self.third = nn.Linear(HIDDEN[1], IN)

    def forward(self, x):
        x = functional.relu(self.first(x))
        return self.third(self.second(x).sigmoid())


class Activation(nn.Module):
    """Has an activation of its own, as in language models."""

    def __init__(self):
        super().__init__()
        self.function = functional.gelu

    def forward(self, input):
        return self.function(input)


class Tower(nn.Sequential):
    """A subclass of Sequential that adds a constructor."""

    def __init__(self, width):
        super().__init__(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))


class Client(nn.Module):
    """All of them, with a residual connection and a head."""

    def __init__(self):
        super().__init__()
        self.before = nn.LayerNorm(IN)
        self.mlp = Mlp(IN, HIDDEN[0])
        self.net = Net()
        self.tower = Tower(IN)
        self.head = nn.Sequential(
            *(nn.Linear(IN, HIDDEN[1], bias=False), nn.BatchNorm1d(HIDDEN[1]), nn.SiLU(), nn.Dropout(0.0)),
            nn.Linear(HIDDEN[1], OUT),
        )

    def forward(self, x):
        x = x + self.mlp(hidden_states=self.before(x))
        return self.head(self.tower(x + self.net(x)))

"""fuse, with models and tools of others. `make clients` installs them and writes the table of docs/clients.md."""

import copy

import pytest
import torch
from fusemlp import MLP, Sequential, fuse, fuse_report, unfuse
from fusemlp.kernels import launch
from nets import HIDDEN, IN, OUT
from torch import nn
from torch.nn import functional

# Other packages warn of what is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")
client = pytest.mark.client


@pytest.fixture
def x():
    return torch.randn(7, IN)


def results(model, run):
    """The output of a model and the gradients of its parameters."""
    model.zero_grad()
    output = run(model)
    output.float().square().mean().backward()
    return [output, *(p.grad for p in model.parameters())]


def assert_fuses(model, run, left=()):
    """Nothing changes in a model but the classes of its layers.

    Args:
        model: the model.
        run: computes its output.
        left: the layers that are left.
    """
    model.eval()
    fused = fuse(model)
    report = fuse_report(fused)
    without_children = {name for name, each in fused.named_modules() if not [*each.children()]}
    assert {each.name for each in report if each.result == "left"} & without_children == {*left}
    assert [*fused.state_dict()] == [*model.state_dict()]
    expected = results(model, run)
    for ours, torchs in zip(results(fused, run), expected, strict=True):
        assert torch.equal(ours, torchs) if torchs is not None else ours is None
    if launch.INTERPRET:
        with launch.backend("triton"):
            found = results(fused, run)
        for ours, torchs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, torchs, rtol=1e-3, atol=1e-5)
    assert {type(m) for m in unfuse(fused).modules()} == {type(m) for m in model.modules()}


def learns(net, x, steps=5):
    """Train and compare losses."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    losses = []
    for _ in range(steps):
        loss = net(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def a_net():
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(IN, HIDDEN[0]), nn.BatchNorm1d(HIDDEN[0]), nn.ReLU(), nn.Dropout(0.0)),
        *(nn.Linear(HIDDEN[0], HIDDEN[1]), nn.ReLU(), nn.Linear(HIDDEN[1], OUT)),
    )


@client("torchvision", "`ops.MLP`")
@pytest.mark.parametrize("norm", [None, nn.BatchNorm1d], ids=["plain", "batch norm"])
def test_torchvision_mlp(norm, x):
    import torchvision

    assert_fuses(torchvision.ops.MLP(IN, [24, 17, 5], norm_layer=norm, dropout=0.1), lambda m: m(x))


@client("torchvision", "`VisionTransformer`: its MLP blocks and head")
def test_torchvision_vit():
    import torchvision

    sizes = {"num_layers": 1, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32, "num_classes": 3}
    model = torchvision.models.VisionTransformer(image_size=32, patch_size=16, **sizes)
    left = ["encoder.layers.encoder_layer_0.self_attention.out_proj"]
    assert_fuses(model, lambda m: m(torch.ones(2, 3, 32, 32)), left)


@client("timm", "vision transformers: their MLP blocks and projections")
def test_timm_vit():
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=3)
    left = ["blocks.0.norm1", "blocks.0.norm2", "norm"]  # layer norms of a class of timm's
    assert_fuses(model, lambda m: m(torch.ones(2, 3, 32, 32)), left)


@client("timm", "MLP-Mixer: its MLP blocks")
def test_timm_mixer():
    import timm

    model = timm.models.MlpMixer(img_size=32, patch_size=16, embed_dim=16, num_blocks=1, num_classes=3)
    assert_fuses(model, lambda m: m(torch.ones(2, 3, 32, 32)))


SMALL = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TOKENS = torch.arange(10).view(2, 5)


@client("transformers", "CLIP: its MLP blocks and projections")
def test_transformers_clip():
    import transformers

    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(vocab_size=20, **SMALL))
    assert_fuses(model, lambda m: m(TOKENS).last_hidden_state)


@client("transformers", "BERT: its feed-forward layers and projections")
def test_transformers_bert():
    import transformers

    model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **SMALL), add_pooling_layer=False)
    assert_fuses(model, lambda m: m(TOKENS).last_hidden_state)


@client("rtdl_revisiting_models", "`MLP`, `ResNet`")
@pytest.mark.parametrize("name", ["MLP", "ResNet"])
def test_rtdl(name, x):
    import rtdl_revisiting_models

    sizes = {"d_in": IN, "d_out": OUT, "n_blocks": 2, "d_block": 24}
    more = {"dropout": 0.1} if name == "MLP" else {"d_hidden_multiplier": 2.0, "dropout1": 0.1, "dropout2": 0.1}
    assert_fuses(getattr(rtdl_revisiting_models, name)(**sizes, **more), lambda m: m(x))


@client("tabm", "`TabM`: its dropouts; its linear layers have classes of their own and stay")
def test_tabm(x):
    import tabm

    model = tabm.TabM.make(n_num_features=IN, d_out=OUT, n_blocks=2, d_block=24, k=3)
    assert_fuses(model, lambda m: m(x))


@client("skorch", "`NeuralNetClassifier` in a grid search of scikit-learn")
def test_skorch():
    import numpy
    from sklearn.model_selection import GridSearchCV
    from skorch import NeuralNetClassifier

    rows, labels = torch.randn(60, IN).numpy(), numpy.arange(60) % OUT

    def search(module):
        net = NeuralNetClassifier(module, criterion=nn.CrossEntropyLoss, max_epochs=2, verbose=0, train_split=None)
        torch.manual_seed(0)
        return GridSearchCV(net, {"lr": [0.1, 0.01]}, cv=2, scoring="neg_log_loss").fit(rows, labels)

    expected, found = search(a_net), search(lambda: fuse(a_net()))
    assert (found.cv_results_["mean_test_score"] == expected.cv_results_["mean_test_score"]).all()
    assert (found.predict_proba(rows) == expected.predict_proba(rows)).all()


@client("lightning", "`Trainer` with averaged weights, saved and loaded")
def test_lightning(tmp_path):
    import lightning
    from lightning.pytorch.callbacks import WeightAveraging

    class Classifier(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def training_step(self, batch, number):
            return functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(32, IN), torch.arange(32) % OUT)

    def fit(net):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        trainer = lightning.Trainer(max_epochs=2, callbacks=[WeightAveraging()], default_root_dir=tmp_path, **quiet)
        model = Classifier(net)
        trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=8))
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return Classifier.load_from_checkpoint(tmp_path / "last.ckpt", net=net).state_dict()

    expected, found = fit(a_net()), fit(fuse(a_net()))
    assert all(map(torch.equal, found.values(), expected.values()))


@client("accelerate", "`prepare`, bfloat16 and accumulated gradients")
def test_accelerate(x):
    from accelerate import Accelerator

    def train(net):
        accelerator = Accelerator(mixed_precision="bf16", cpu=True, gradient_accumulation_steps=2)
        net, optimizer = accelerator.prepare(net, torch.optim.SGD(net.parameters(), lr=0.1))
        for _ in range(4):
            with accelerator.accumulate(net):
                loss = net(x).square().mean()
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
        return accelerator.unwrap_model(net).state_dict()

    expected, found = train(a_net()), train(fuse(a_net()))
    assert all(map(torch.equal, found.values(), expected.values()))


@client("captum", "`IntegratedGradients`; `DeepLift`, whose hooks have layers run one by one", "captum.attr")
@pytest.mark.parametrize("method", ["IntegratedGradients", "DeepLift"])
def test_captum(method, x):
    from captum import attr

    net = a_net().eval()
    expected, found = (getattr(attr, method)(m).attribute(x, target=1) for m in (net, fuse(net)))
    assert torch.equal(found, expected)
    assert found.abs().sum() > 0


@client("peft", "LoRA on fused layers, merged afterwards")
def test_peft(x):
    import peft

    def tuned(net):
        torch.manual_seed(2)
        model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["0", "4"], lora_dropout=0.0))
        losses = learns(model, x)
        assert losses[-1] < losses[0]
        return model.merge_and_unload().eval()(x)

    assert torch.equal(tuned(fuse(a_net())), tuned(a_net()))


@client("stable_baselines3", "PPO, its policy fused in place", "stable_baselines3", "gymnasium")
def test_stable_baselines():
    from stable_baselines3 import PPO

    def learn(change):
        agent = PPO("MlpPolicy", "CartPole-v1", n_steps=16, batch_size=8, n_epochs=1, seed=0, device="cpu")
        change(agent.policy)
        return agent.learn(48).policy.state_dict()

    expected, found = learn(lambda policy: policy), learn(lambda policy: fuse(policy, inplace=True))
    assert all(map(torch.equal, found.values(), expected.values()))


@client("torchao", "int8 weights of fused layers, which PyTorch then serves", "torchao.quantization")
def test_torchao(x):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    nets = a_net().eval(), fuse(a_net().eval())
    for net in nets:
        quantize_(net, Int8WeightOnlyConfig())
    expected, found = (net(x) for net in nets)
    assert torch.equal(found, expected)


@client("onnxruntime", "`torch.onnx.export` of a fused net, at another batch size", "onnxruntime", "onnxscript")
def test_onnxruntime(x, tmp_path):
    import onnxruntime

    net, path = fuse(a_net().eval()), tmp_path / "net.onnx"
    batch = torch.export.Dim("batch")
    torch.onnx.export(net, (torch.randn(4, IN),), path, dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), net(x).detach(), rtol=1e-4, atol=1e-5)


@client("onnxruntime", "`torch.onnx.export` of an `MLP`, at another batch size", "onnxruntime", "onnxscript")
def test_onnxruntime_mlp(x, tmp_path):
    import onnxruntime

    net, path = MLP(IN, HIDDEN, OUT, batch_norm=True).eval(), tmp_path / "net.onnx"
    assert isinstance(net, Sequential)
    batch = torch.export.Dim("batch")
    torch.onnx.export(net, (torch.randn(4, IN),), path, dynamic_shapes=({0: batch},), dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), copy.deepcopy(net)(x).detach(), rtol=1e-4, atol=1e-5)

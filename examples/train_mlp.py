"""Train an MLP on scikit-learn's handwritten digits with a plain PyTorch loop.

Only the model and the loss come from fusemlp; the optimizer, the loop and the evaluation are those of any torch.nn net.
On a GPU the fused kernels serve the net, on a CPU PyTorch does.
"""

import fusemlp
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

EPOCHS, BATCH = 20, 64
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
torch.set_float32_matmul_precision("high")  # On a GPU the kernels serve float32 products where TF32 is allowed.
torch.set_num_threads(1)  # On a CPU a net this small is fastest on one thread.
torch.manual_seed(0)

digits = load_digits()
pixels = torch.tensor(digits.data, dtype=torch.float32, device=device) / 16  # (1797, 64)
labels = torch.tensor(digits.target, device=device)
train, test = train_test_split(range(len(labels)), test_size=0.2, random_state=0, stratify=digits.target)
train, test = torch.tensor(train, device=device), torch.tensor(test, device=device)

net = fusemlp.MLP(64, [128, 128], 10, batch_norm=True, dropout=0.1, device=device)
loss_function = fusemlp.CrossEntropyLoss()
optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)

for _ in range(EPOCHS):
    net.train()
    for rows in train[torch.randperm(len(train), device=device)].split(BATCH):
        optimizer.zero_grad()
        loss = loss_function(net(pixels[rows]), labels[rows])
        loss.backward()
        optimizer.step()

net.eval()
with torch.no_grad():
    predicted = net(pixels[test]).argmax(1)
accuracy = (predicted == labels[test]).double().mean().item()
print(f"test accuracy after {EPOCHS} epochs on {device.type}: {accuracy:.4f}")

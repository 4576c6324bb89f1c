"""For tests of DiT: a small network whose weights all matter, a few images, a small training."""

import torch

import sciflow_hf as sf
from sciflow_hf.networks.dit import DiTForImageDiffusion

SMALL = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_classes=5, in_channels=3, image_size=8)


def make_network(kind=DiTForImageDiffusion, **options):
    """As it is made, a DiT answers 0 and its blocks do nothing: here all weights are drawn."""
    shape = dict(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, num_classes=5, in_channels=3)
    network = kind(**(shape | {"image_size": (4, 10)} | options))
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return network.eval()


class FewImages(torch.utils.data.Dataset):
    """Images of 5 classes, each class a colour of its own."""

    num_classes = 5

    def __init__(self, number=24, seed=0, size=(8, 8)):
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.arange(number) % 5
        colours = torch.tensor([[-0.9, 0, 0.9], [0.9, 0, -0.9], [0, 0.9, 0], [0.9, 0.9, 0.9], [-0.9, -0.9, -0.9]])
        noise = 0.1 * torch.randn(number, 3, *size, generator=generator)
        self.pixels = (colours[self.labels][:, :, None, None] + noise).clamp(-1, 1)
        self.buckets, self.row_ids = [size] * number, [f"{seed}-{i}" for i in range(number)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, row):
        return {"pixel_values": self.pixels[row], "class_labels": self.labels[row]}


def dit_trainer(folder, *, family=None, train=None, held_out=None, **options):
    defaults = dict(
        output_dir=str(folder), use_cpu=True, max_steps=8, save_strategy="no", logging_steps=2, disable_tqdm=True,
        per_device_train_batch_size=4, per_device_eval_batch_size=4, learning_rate=1e-2, seed=3, report_to="none",
        validation_steps=100, num_inference_steps=2,
    )  # fmt: skip
    args = sf.DiffusionTrainingArguments(**(defaults | options))
    family = family or sf.DiT(**SMALL)
    model = family.load_model(dtype=torch.float32)
    return sf.DiffusionTrainer(model, args, family=family, train_dataset=train or FewImages(), eval_dataset=held_out)


def mean_colour():
    """A feature network: mean and spread of each channel."""
    return lambda images: torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3))], dim=1)


def brightness():
    """A classifier of ten classes by the mean of an image."""
    return lambda images: -(images.mean(dim=(1, 2, 3))[:, None] - torch.linspace(-1, 1, 10)).abs()

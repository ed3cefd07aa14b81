"""SAM with Lightning: the module derives from SharpnessAwareModule; accumulation, clipping and precision are the Trainer's."""

import torch
from lightning.pytorch import Trainer
from torch import nn

import samkern
from samkern.integrations.lightning import SharpnessAwareModule


class Net(SharpnessAwareModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 3))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = nn.functional.cross_entropy(self.layers(x), y)
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        opt = samkern.SAM(self.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.05, model=self)
        rates = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max=40)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


torch.manual_seed(0)
x = torch.randn(512, 20)
data = torch.utils.data.TensorDataset(x, x[:, :3].argmax(1))
trainer = Trainer(
    accelerator="cpu",
    max_epochs=5,
    accumulate_grad_batches=2,
    gradient_clip_val=1.0,
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Net(), torch.utils.data.DataLoader(data, batch_size=32, shuffle=True))
opt = trainer.optimizers[0]
print(f"{trainer.global_step} steps, {opt.evaluations} pairs, loss {trainer.callback_metrics['loss'].item():.4f}")

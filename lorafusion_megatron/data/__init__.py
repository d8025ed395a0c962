"""Reading, chat templates, tokenizing and packed collation; no torch."""

from lorafusion_megatron.data.collate import NO_JOB, PackedBatch, collate
from lorafusion_megatron.data.dataset import JobDataset
from lorafusion_megatron.data.load import load_dataset
from lorafusion_megatron.data.order import GlobalBatches
from lorafusion_megatron.data.source import DataSource

__all__ = ["NO_JOB", "DataSource", "GlobalBatches", "JobDataset", "PackedBatch", "collate", "load_dataset"]

from datasets.coco import CocoDataset, collate, open_dataset
from datasets.layouts import Source

__all__ = ["CocoDataset", "Source", "collate", "open_dataset"]

"""TreeDiffusion at scale: the hierarchy of groups in unlabelled images, and sharp new images of every group."""

__version__ = "0.1.0"

from rodimus_lab.ops.diagonal_scan.dispatch import diagonal_scan, starts_BT
from rodimus_lab.ops.diagonal_scan.selective import selective_scan

__all__ = ["diagonal_scan", "selective_scan", "starts_BT"]

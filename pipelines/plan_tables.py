"""A recipe's `[plan]`: prices and hardware that `loupe plan` counts with. No part of any identity.

Source of the defaults: a large cloud's list prices of 2026 (standard object storage in one region, one H100 by the hour), and an H100's peak in the
type that the encoder computes in.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from model.specs import Compute
from model.views import Branch
from pipelines.costs import Cluster, Prices
from pipelines.recipe_fields import Count, KeptShare, NotNegative, Positive, Table, allowed

__all__ = ["Plan"]

_PRICES = Prices()


class PlanPrices(Table):
    """US dollars."""

    storage_gb_month: NotNegative = _PRICES.storage_gb_month
    put_thousand: NotNegative = _PRICES.put_thousand
    get_thousand: NotNegative = _PRICES.get_thousand
    device_hour: NotNegative = _PRICES.device_hour
    core_hour: NotNegative = _PRICES.core_hour

    def prices(self) -> Prices:
        """As the arithmetic takes them."""
        return Prices(**self.model_dump())


_PEAK_TFLOPS: dict[Compute, float] = {"fp32": 67.0, "bf16": 989.0, "fp16": 989.0}
"""Of an H100 (SXM), by its data sheet, without sparsity; fp32 without TF32, which Loupe does not use."""


class PlanCluster(Table):
    """Hardware that is to make the cache, in place of the machine at hand."""

    devices: Count = 8
    device_tflops: Positive | None = None
    """Peak of matrix products of one device, in the type that the encoder computes in; an H100's when absent: 67 in fp32, 989 in bf16 and fp16."""
    train_tflops: Positive | None = None
    """Peak in bf16, in which training multiplies; when absent `device_tflops` in the ratio of an H100's: the same where that is of bf16 or fp16, 989
    for every 67 of fp32."""
    device_share: Annotated[KeptShare, allowed("a finite number greater than 0 and at most 1")] = 0.6
    """Of that peak, what the forward pass reaches."""
    cores: Count = 96
    network_gbit_s: Positive = 100.0
    network_share: Annotated[KeptShare, allowed("a finite number greater than 0 and at most 1")] = 0.8

    def peak_tflops(self, compute: Compute) -> float:
        """Of one device, in a type."""
        return _PEAK_TFLOPS[compute] if self.device_tflops is None else self.device_tflops

    def peak_train_tflops(self, compute: Compute) -> float:
        """Of one device in bf16, where an encoder computes in a type."""
        return self.peak_tflops(compute) * _PEAK_TFLOPS["bf16"] / _PEAK_TFLOPS[compute] if self.train_tflops is None else self.train_tflops

    def cluster(self, view_flops: Mapping[Branch, int], compute: Compute) -> Cluster:
        """As the arithmetic takes it.

        Args:
            view_flops: operations of one view's forward pass, by branch.
            compute: in which type.
        """
        flop_s = self.devices * self.peak_tflops(compute) * 1e12 * self.device_share
        return Cluster(
            devices=self.devices,
            views_per_s={branch: flop_s / flops for branch, flops in view_flops.items()},
            cores=self.cores,
            encoders=self.devices,
            network_bytes_per_s=self.network_gbit_s * 1e9 / 8 * self.network_share,
            shares_cores=False,
        )


class Plan(Table):
    """What `loupe plan` counts with."""

    months: Positive = 1.0
    """For which the cache is kept."""
    passes: Annotated[float, Field(gt=0, allow_inf_nan=False), allowed("a finite number greater than 0")] | None = None
    """Training passes over it; the views that the schedule sees with all seeds, over those of the cache, when absent."""
    prices: PlanPrices = PlanPrices()
    cluster: PlanCluster | None = None
    """The machine at hand, as it is probed, when absent."""

"""`Deployment`: what is simulated: a model, the devices that share it, and how it is served."""

import dataclasses

from sarathi_jax.config import EngineConfig, ModelConfig
from sarathi_jax.latency import Device, HostTerm, LatencyTable, Link, Roofline
from sarathi_jax.partition import split_layers


@dataclasses.dataclass(frozen=True)
class Deployment:
    """A model served on devices that need not be at hand.

    Attributes:
      model: what is served.
      device: of which there are ``dp * tp * pp``.
      engine: as it would be served: policy, buckets, tp, pp, dp, limits, promises; without `num_blocks` the cache has
        what memory leaves.
      table: measured times of the programs in place of the roofline's; pp must be 1.
      host: what the serving stack adds to the kernels' time; None: nothing.
      pads: a step takes the time of its bucket, as compiled programs do; False: of its tokens, as eager stacks do.
      tp_link, pp_link: of the devices of a stage, of two stages; None: the device's own.
    """

    model: ModelConfig
    device: Device
    engine: EngineConfig
    table: LatencyTable | None = None
    host: HostTerm | None = None
    pads: bool = True
    tp_link: Link | None = None
    pp_link: Link | None = None

    def roofline(self) -> Roofline:
        """Times of its steps from flops and bytes.

        Raises:
          ValueError: layers or links that do not fit the devices.
        """
        engine = self.engine
        return Roofline(
            self.model,
            self.device,
            engine.tp,
            engine.pp,
            pp_layers=tuple(len(stage.layers) for stage in split_layers(self.model, engine)),
            tp_link=self.tp_link,
            pp_link=self.pp_link,
            host=self.host,
            weight_bytes=2 if engine.quantization is None else 1,
        )

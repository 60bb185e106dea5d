"""TensorBoard event files, through tensorboard's own writer (no TensorFlow).

Promises: scalars, text, images and hyperparameters in the run folder, under names `group/what`.  A resumed run first
tells TensorBoard from which step on what it saw before no longer counts.
Does not know what is measured.
"""

import io
import pathlib
import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter


class Curves:
    """Writer of one folder's events; `first_step` is where this process goes on."""

    def __init__(self, folder: pathlib.Path, first_step: int):
        self._writer = EventFileWriter(str(folder), flush_secs=10)
        if first_step:
            self._writer.add_event(
                Event(wall_time=time.time(), step=first_step, session_log=SessionLog(status=SessionLog.START))
            )

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._add(step, [Summary.Value(tag=name, simple_value=float(value)) for name, value in values.items()])

    def text(self, step: int, name: str, markdown: str) -> None:
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(
            dtype=DT_STRING,
            string_val=[markdown.encode("utf-8")],
            tensor_shape=TensorShapeProto(dim=[TensorShapeProto.Dim(size=1)]),
        )
        self._add(step, [Summary.Value(tag=name, metadata=metadata, tensor=tensor)])

    def image(self, step: int, name: str, png: bytes) -> None:
        from PIL import Image

        width, height = Image.open(io.BytesIO(png)).size
        image = Summary.Image(encoded_image_string=png, width=width, height=height, colorspace=4)
        self._add(step, [Summary.Value(tag=name, image=image)])

    def hyperparameters(self, values: dict) -> None:
        """Fills the HParams page; values are numbers, words or truth values."""
        self._writer.add_event(Event(wall_time=time.time(), summary=hparams_pb(values)))

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, values: list) -> None:
        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

"""TensorBoard event files, through tensorboard's own records (no TensorFlow).

Promises: scalars, text, images and hyperparameters in the run folder, under names `group/what`, each handed to the
operating system when the call returns; in a bucket within half a minute.  A resumed run first tells TensorBoard from
which step on what it saw before no longer counts.
Does not know what is measured.
"""

import io
import os
import pathlib
import socket
import time

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.compat.proto.tensor_pb2 import TensorProto
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.types_pb2 import DT_STRING
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from robust_mo import hosts
from robust_mo.runs import GrowingObject, naming, place


class Curves:
    """Writer of one folder's events; what an earlier process wrote of the steps after `last_step` does not count, with
    None all does.

    On any but the first host they are written nowhere.
    """

    def __init__(self, folder: pathlib.Path, last_step: int | None):
        # Written here and now: tensorboard's own writer does it in a thread, where a full disk goes unnoticed.
        name = f"events.out.tfevents.{time.time_ns()}.{socket.gethostname()}.{os.getpid()}"
        self._file = place(folder) / name if hosts.first() else pathlib.Path(os.devnull)
        local = isinstance(self._file, pathlib.Path)
        self._writer = RecordWriter(open(self._file, "wb", buffering=0) if local else GrowingObject(self._file))
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if last_step is not None:
            # In a run's first file too: at the first such mark TensorBoard takes it that nothing was before.
            start = SessionLog(status=SessionLog.START)
            self._write(Event(wall_time=time.time(), step=last_step + 1, session_log=start))

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

    def hyperparameters(self, values: dict[str, bool | float | str], name: str) -> None:
        """Begins this folder's session on the HParams page, whose metrics are the newest scalars.

        What differs between the runs beside each other comes first there, since no experiment is declared for them.

        Args:
          name: as the page calls the run; runs of one name are averaged.
        """
        self._add(0, list(hparams_pb(values, trial_id=name).value))

    def finished(self) -> None:
        """Ends the session begun with `hyperparameters`."""
        end = plugin_data_pb2.SessionEndInfo(status=api_pb2.STATUS_SUCCESS, end_time_secs=time.time())
        about = metadata.create_summary_metadata(plugin_data_pb2.HParamsPluginData(session_end_info=end))
        value = Summary.Value(tag=metadata.SESSION_END_INFO_TAG, metadata=about, tensor=metadata.NULL_TENSOR)
        self._add(0, [value])

    def close(self) -> None:
        self._writer.close()

    def _add(self, step: int, values: list) -> None:
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def _write(self, event: Event) -> None:
        with naming(self._file):
            self._writer.write(event.SerializeToString())

"""Detectors of mmdetection, compared with mmdetection's own code."""

import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling import build_model
from PIL import Image

from nl_detectron.weights import ConversionError, convert
from nl_detectron.weights.python_config import Unread, read_python_config
from tests.weights.test_helpers import build_from

pytest.importorskip("mmdet")
from tests.weights import mmdet_peer

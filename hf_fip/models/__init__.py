"""Models that transformers lacks. Importing this package makes transformers' Auto classes know them."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForVideoClassification,
)

from .cnn_lstm import CNNLSTMConfig, CNNLSTMForVideoClassification, CNNLSTMModel
from .conv_seq2seq import ConvSeq2SeqConfig, ConvSeq2SeqForConditionalGeneration
from .lstm_seq2seq import LSTMSeq2SeqConfig, LSTMSeq2SeqForConditionalGeneration
from .point_cloud import AutoModelForPointCloudClassification
from .pointnet import PointNetConfig, PointNetForPointCloudClassification, PointNetModel
from .pointnet2 import PointNet2Config, PointNet2ForPointCloudClassification, PointNet2Model
from .preact_resnet import PreActResNetConfig, PreActResNetForImageClassification
from .wide_resnet import WideResNetConfig, WideResNetForImageClassification

# Auto class -> the models it is to load
_MODELS = {
    AutoModel: (CNNLSTMModel, PointNetModel, PointNet2Model),
    AutoModelForImageClassification: (PreActResNetForImageClassification, WideResNetForImageClassification),
    AutoModelForPointCloudClassification: (PointNetForPointCloudClassification, PointNet2ForPointCloudClassification),
    AutoModelForSeq2SeqLM: (ConvSeq2SeqForConditionalGeneration, LSTMSeq2SeqForConditionalGeneration),
    AutoModelForVideoClassification: (CNNLSTMForVideoClassification,),
}

__all__ = [
    "AutoModelForPointCloudClassification",
    "CNNLSTMConfig",
    "CNNLSTMForVideoClassification",
    "CNNLSTMModel",
    "PointNet2Config",
    "PointNet2ForPointCloudClassification",
    "PointNet2Model",
    "PointNetConfig",
    "PointNetForPointCloudClassification",
    "PointNetModel",
    "PreActResNetConfig",
    "PreActResNetForImageClassification",
    "WideResNetConfig",
    "WideResNetForImageClassification",
    "ConvSeq2SeqConfig",
    "ConvSeq2SeqForConditionalGeneration",
    "LSTMSeq2SeqConfig",
    "LSTMSeq2SeqForConditionalGeneration",
]

for _auto_class, _models in _MODELS.items():
    for _model in _models:
        AutoConfig.register(_model.config_class.model_type, _model.config_class, exist_ok=True)
        _auto_class.register(_model.config_class, _model)

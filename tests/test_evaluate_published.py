"""evaluate.py robustness on tables that others printed: the line they printed, and scipy's."""

import numpy as np
import pytest
from scipy import stats
from scipy.special import expit, logit

import evaluate

# Recht et al., Do ImageNet Classifiers Generalize to ImageNet?, arXiv 1902.10811, appendix: percent of CIFAR-10's test
# images (10,000) and of their new ones (2,021) that each model gets right. All new accuracies but those of autoaug_* equal
# the authors' released predictions (github.com/modestyachts/CIFAR-10.1, v4) to the digit; the latter are not released.
CIFAR = """autoaug_pyramid_net 98.4 95.5
autoaug_shake_shake_112 98.1 93.9
autoaug_shake_shake_96 98.0 93.7
autoaug_wrn 97.5 93.0
autoaug_shake_shake_32 97.3 92.9
shake_shake_64d_cutout 97.1 93.0
shake_shake_26_2x96d_SSI 97.1 91.9
shake_shake_64d 97.0 91.4
wrn_28_10_cutout16 97.0 92.0
shake_drop 96.9 92.3
shake_shake_32d 96.6 89.8
darc 96.6 89.5
resnext_29_4x64d 96.4 89.6
pyramidnet_basic_110_270 96.3 90.5
resnext_29_8x64d 96.2 90.0
wrn_28_10 95.9 89.7
pyramidnet_basic_110_84 95.7 89.3
densenet_BC_100_12 95.5 87.6
nas 95.4 88.8
wide_resnet_28_10 95.0 88.5
resnet_v2_bottleneck_164 94.2 85.9
vgg16_keras 93.6 85.3
resnet_basic_110 93.5 85.2
resnet_v2_basic_110 93.4 86.5
resnet_basic_56 93.3 85.0
resnet_basic_44 93.0 84.2
vgg_15_BN_64 93.0 84.9
resnetv2_32 92.7 84.4
resnet_basic_32 92.5 84.9
cudaconvnet 88.5 77.5
random_features_256k_aug 85.6 73.1
random_features_32k_aug 85.0 71.9
random_features_256k 84.2 69.9
random_features_32k 83.3 67.9"""


def test_line_of_recht_et_al(tmp_path):
    """They print new = 1.69 original - 72.7 (percent, all 34 models). The table's rounding to 0.1 moves the slope by a
    standard deviation of 0.0024 and the intercept by 0.23 (simulated): three of these, and the rounding of the two."""
    rows = [line.split() for line in CIFAR.splitlines()]
    x, y = np.array([row[1:] for row in rows], float).T
    slope, intercept, r2 = evaluate.fit_lines(x, y, np.ones(34))
    assert slope == pytest.approx(1.69, abs=3 * 0.0024 + 0.005)
    assert intercept == pytest.approx(-72.7, abs=3 * 0.23 + 0.05) and r2 > 0.98

    lines = ["model,group,cifar10,new"] + [
        f"{m},{'autoaug' if 'autoaug' in m else 'standard'},{a},{b}" for m, a, b in rows
    ]
    (tmp_path / "t.csv").write_text("\n".join(lines))
    n = {"cifar10": "10000", "new": "2021"}
    result = evaluate.robustness([str(tmp_path / "t.csv")], "cifar10", [], "standard", "", {}, n, {}, 200, 0)
    best = result["rows"]["autoaug_pyramid_net"]
    for key, ends in ("new id", (98.1, 98.6)), ("new", (94.5, 96.4)):  # the paper's Clopper-Pearson intervals
        assert (100 * best[key]["low"], 100 * best[key]["high"]) == pytest.approx(ends, abs=0.05)
    line = stats.linregress(logit(x[5:] / 100), logit(y[5:] / 100))  # the command's axes, without AutoAugment
    fit = result["fits"]["new, standard"]
    assert (fit["slope"]["value"], fit["intercept"]["value"], fit["r2"]["value"]) == pytest.approx(
        (line.slope, line.intercept, line.rvalue**2), abs=1e-12
    )
    rho = y[0] / 100 - expit(line.slope * logit(x[0] / 100) + line.intercept)
    assert best["new rho"]["value"] == pytest.approx(rho, abs=1e-12) and best["new extrapolated"]


# Wen et al., the transfer table of their released notebook (percent): models pre-trained on LAIONet, then on ImageNet.
TRANSFER = """model,group,cifar10,cifar100,food,pets,sun397
LAIONet K=65536,laionet,83.5,60.0,48.6,55.5,55.4
LAIONet S=1024,laionet,83.9,61.4,50.7,57.7,56.0
LAIONet S=4096,laionet,84.6,63.4,53.3,61.0,56.9
LAIONet S=16384,laionet,85.4,63.9,54.3,62.2,57.7
ImageNet K=65536,imagenet,86.4,62.9,55.8,66.4,57.0
"""


def test_fit_of_the_transfer_table(tmp_path):
    """Lines on the logit scale through the four LAIONet models, and what ImageNet has beyond them, against linregress."""
    path = tmp_path / "published.csv"
    path.write_text(TRANSFER)
    result = evaluate.robustness([str(path)], "food", [], "laionet", "", {}, {}, {}, 0, 0)
    columns = np.array([line.split(",")[2:] for line in TRANSFER.splitlines()[1:]], float).T / 100
    tables = dict(zip(("cifar10", "cifar100", "food", "pets", "sun397"), np.log(columns / (1 - columns))))
    for shift in ("cifar10", "cifar100", "pets", "sun397"):
        x, y = tables["food"], tables[shift]
        line, fit = stats.linregress(x[:4], y[:4]), result["fits"][f"{shift}, laionet"]
        assert fit["slope"]["value"] == pytest.approx(line.slope, abs=1e-9)
        assert fit["intercept"]["value"] == pytest.approx(line.intercept, abs=1e-9)
        assert fit["r2"]["value"] == pytest.approx(line.rvalue**2, abs=1e-9)
        rho = 1 / (1 + np.exp(-y[4])) - 1 / (1 + np.exp(-(line.slope * x[4] + line.intercept)))
        assert result["rows"]["ImageNet K=65536"][f"{shift} rho"]["value"] == pytest.approx(rho, abs=1e-9)
    assert result["rows"]["ImageNet K=65536"]["pets extrapolated"]

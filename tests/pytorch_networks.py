"""I3D and Inception-v3 written out in PyTorch, from arrays by the names of their published files."""

import numpy as np
import torch
import torch.nn.functional as F


def _tensors(arrays):
    return {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}


def resized(frames, size):
    """Frames uint8 [..., H, W, 3] to [..., 3, size, size] in [-1, 1]."""
    x = torch.from_numpy(frames).float().movedim(-1, -3)
    y = F.interpolate(x.flatten(0, -4), (size, size), mode="bilinear", align_corners=False)
    return y.reshape(*x.shape[:-2], size, size) * 2 / 255 - 1


def _same(x, window, strides, value=0.0):
    """TensorFlow's padding: the odd row is at the end."""
    pads = []
    for n, k, s in zip(reversed(x.shape[2:]), reversed(window), reversed(strides), strict=True):
        total = max((-(-n // s) - 1) * s + k - n, 0)
        pads += [total // 2, total - total // 2]
    return F.pad(x, pads, value=value)


def i3d(arrays, x):
    """Clips [B, 3, T, H, W] in [-1, 1] to logits [B, 400]."""
    w = _tensors(arrays)

    def unit(x, name, stride=1):
        kernel = w[f"{name}.conv3d.weight"]
        x = F.conv3d(_same(x, kernel.shape[2:], (stride,) * 3), kernel, stride=stride)
        norm = [w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *norm, eps=1e-3))

    def pool(x, window, strides):
        return F.max_pool3d(_same(x, window, strides, -torch.inf), window, strides)

    def mixed(x, name):
        b0 = unit(x, f"{name}.b0")
        b1 = unit(unit(x, f"{name}.b1a"), f"{name}.b1b")
        b2 = unit(unit(x, f"{name}.b2a"), f"{name}.b2b")
        b3 = unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.b3b")
        return torch.cat([b0, b1, b2, b3], dim=1)

    x = unit(x, "Conv3d_1a_7x7", 2)
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = unit(unit(x, "Conv3d_2b_1x1"), "Conv3d_2c_3x3")
    x = pool(x, (1, 3, 3), (1, 2, 2))
    x = mixed(mixed(x, "Mixed_3b"), "Mixed_3c")
    x = pool(x, (3, 3, 3), (2, 2, 2))
    for block in "bcdef":
        x = mixed(x, f"Mixed_4{block}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    x = mixed(mixed(x, "Mixed_5b"), "Mixed_5c")
    x = F.avg_pool3d(x, (2, *x.shape[3:]), stride=1)
    return F.conv3d(x, w["logits.conv3d.weight"], w["logits.conv3d.bias"]).mean(dim=(2, 3, 4))


def inception(arrays, x):
    """Frames [B, 3, H, W] in [-1, 1] to the features of FID [B, 2048]."""
    w = _tensors(arrays)

    def unit(x, name, stride=1, padding=0):
        x = F.conv2d(x, w[f"{name}.conv.weight"], stride=stride, padding=padding)
        norm = [w[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        return F.relu(F.batch_norm(x, *norm, eps=1e-3))

    def mean(x):
        return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def a(x, name):
        five = unit(unit(x, f"{name}.branch5x5_1"), f"{name}.branch5x5_2", padding=2)
        three = unit(unit(x, f"{name}.branch3x3dbl_1"), f"{name}.branch3x3dbl_2", padding=1)
        three = unit(three, f"{name}.branch3x3dbl_3", padding=1)
        return torch.cat([unit(x, f"{name}.branch1x1"), five, three, unit(mean(x), f"{name}.branch_pool")], 1)

    def c(x, name):
        seven = unit(unit(x, f"{name}.branch7x7_1"), f"{name}.branch7x7_2", padding=(0, 3))
        seven = unit(seven, f"{name}.branch7x7_3", padding=(3, 0))
        double = unit(unit(x, f"{name}.branch7x7dbl_1"), f"{name}.branch7x7dbl_2", padding=(3, 0))
        double = unit(double, f"{name}.branch7x7dbl_3", padding=(0, 3))
        double = unit(double, f"{name}.branch7x7dbl_4", padding=(3, 0))
        double = unit(double, f"{name}.branch7x7dbl_5", padding=(0, 3))
        return torch.cat([unit(x, f"{name}.branch1x1"), seven, double, unit(mean(x), f"{name}.branch_pool")], 1)

    def e(x, name, pool):
        def fork(x, name):
            return unit(x, f"{name}a", padding=(0, 1)), unit(x, f"{name}b", padding=(1, 0))

        three = fork(unit(x, f"{name}.branch3x3_1"), f"{name}.branch3x3_2")
        double = unit(unit(x, f"{name}.branch3x3dbl_1"), f"{name}.branch3x3dbl_2", padding=1)
        double = fork(double, f"{name}.branch3x3dbl_3")
        return torch.cat([unit(x, f"{name}.branch1x1"), *three, *double, unit(pool(x), f"{name}.branch_pool")], 1)

    x = unit(unit(x, "Conv2d_1a_3x3", 2), "Conv2d_2a_3x3")
    x = F.max_pool2d(unit(x, "Conv2d_2b_3x3", padding=1), 3, 2)
    x = F.max_pool2d(unit(unit(x, "Conv2d_3b_1x1"), "Conv2d_4a_3x3"), 3, 2)
    x = a(a(a(x, "Mixed_5b"), "Mixed_5c"), "Mixed_5d")
    double = unit(unit(x, "Mixed_6a.branch3x3dbl_1"), "Mixed_6a.branch3x3dbl_2", padding=1)
    double = unit(double, "Mixed_6a.branch3x3dbl_3", 2)
    x = torch.cat([unit(x, "Mixed_6a.branch3x3", 2), double, F.max_pool2d(x, 3, 2)], 1)
    x = c(c(c(c(x, "Mixed_6b"), "Mixed_6c"), "Mixed_6d"), "Mixed_6e")
    seven = unit(unit(x, "Mixed_7a.branch7x7x3_1"), "Mixed_7a.branch7x7x3_2", padding=(0, 3))
    seven = unit(unit(seven, "Mixed_7a.branch7x7x3_3", padding=(3, 0)), "Mixed_7a.branch7x7x3_4", 2)
    three = unit(unit(x, "Mixed_7a.branch3x3_1"), "Mixed_7a.branch3x3_2", 2)
    x = torch.cat([three, seven, F.max_pool2d(x, 3, 2)], 1)
    x = e(x, "Mixed_7b", mean)
    x = e(x, "Mixed_7c", lambda x: F.max_pool2d(x, 3, 1, 1))
    return x.mean(dim=(2, 3))

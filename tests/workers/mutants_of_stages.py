"""Broken indexers, each by one plausible slip in one stage, and the gates that have to stop it. Shape suffixes as in `other_indexer`."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tests.workers.other_indexer import OtherIndexer, Product, accumulate_in
from workers.indexer.reference import topk_rows

FP8 = torch.float8_e4m3fn
FP16_SUMS, BF16_SUMS = accumulate_in(torch.float16, 16), accumulate_in(torch.bfloat16, 16)


class ProjectsHeadsAcross(OtherIndexer):
    """Takes the projection's outputs as [D, H]."""

    def project_q(self, q_lora_TR):
        return super().project_q(q_lora_TR).reshape(-1, 128, self.dims.num_heads).transpose(1, 2)


@dataclass(frozen=True)
class AccumulatesInFp16(OtherIndexer):
    matmul: Product = FP16_SUMS


@dataclass(frozen=True)
class AccumulatesInBf16(OtherIndexer):
    matmul: Product = BF16_SUMS


class NormWithoutBias(OtherIndexer):
    def norm_k(self, k_TD):
        return torch.nn.functional.layer_norm(k_TD.float(), (128,), self.weights.k_norm_weight, None, 1e-6).to(torch.bfloat16)


class NormWithoutMean(OtherIndexer):
    """RMSNorm, which the rest of the model has."""

    def norm_k(self, k_TD):
        k = k_TD.float()
        k = k * (k.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        return (k * self.weights.k_norm_weight + self.weights.k_norm_bias).to(torch.bfloat16)


class NormOfASample(OtherIndexer):
    """Divides the variance by D - 1."""

    def norm_k(self, k_TD):
        k = k_TD.float()
        k = (k - k.mean(-1, keepdim=True)) * (k.var(-1, keepdim=True) + 1e-6).rsqrt()
        return (k * self.weights.k_norm_weight + self.weights.k_norm_bias).to(torch.bfloat16)


class NormWithTorchsEps(OtherIndexer):
    """torch's default of 1e-5."""

    def norm_k(self, k_TD):
        w = self.weights
        return torch.nn.functional.layer_norm(k_TD.float(), (128,), w.k_norm_weight, w.k_norm_bias, 1e-5).to(torch.bfloat16)


class NormInBf16(OtherIndexer):
    """Rounds the normalised key before its weight and bias."""

    def norm_k(self, k_TD):
        k = torch.nn.functional.layer_norm(k_TD.float(), (128,), eps=1e-6).to(torch.bfloat16)
        return k * self.weights.k_norm_weight.to(torch.bfloat16) + self.weights.k_norm_bias.to(torch.bfloat16)


class OtherRopeStyle(OtherIndexer):
    def rope(self, x, positions_T):
        style = "interleaved" if self.dims.rope_style == "neox" else "neox"
        return OtherIndexer(self.dims.model_copy(update={"rope_style": style}), self.weights).rope(x, positions_T)


class KeysShiftedByOne(OtherIndexer):
    def rope(self, x, positions_T):
        return super().rope(x, positions_T + 1 if x.dim() == 2 else positions_T)


class QueriesAtLocalPositions(OtherIndexer):
    """Counts a rank's rows from 0 instead of taking their places in the request."""

    def rope(self, x, positions_T):
        return super().rope(x, torch.arange(len(x)) if x.dim() == 3 else positions_T)


class TurnsBackwards(OtherIndexer):
    def rope(self, x, positions_T):
        return super().rope(x, -positions_T)


class TurnsTheLastDims(OtherIndexer):
    """RoPE on the last dims of the head, where MLA has it."""

    def rope(self, x, positions_T):
        rest = 128 - self.dims.rope_dim
        swapped = super().rope(x.roll(self.dims.rope_dim - 128, -1), positions_T)
        return swapped.roll(rest, -1)


class PositionsInBf16(OtherIndexer):
    def rope(self, x, positions_T):
        return super().rope(x, positions_T.to(torch.bfloat16))


class TwiceTheTheta(OtherIndexer):
    def frequencies(self):
        dims = self.dims.model_copy(update={"rope_theta": 2 * self.dims.rope_theta})
        return OtherIndexer(dims, self.weights).frequencies()


class WithoutYarn(OtherIndexer):
    def frequencies(self):
        return OtherIndexer(self.dims.model_copy(update={"yarn": None}), self.weights).frequencies()


class NoHadamardOnQ(OtherIndexer):
    def hadamard(self, x):
        return x if x.dim() == 3 else super().hadamard(x)


class NoHadamardOnK(OtherIndexer):
    def hadamard(self, x):
        return x if x.dim() == 2 else super().hadamard(x)


class HadamardWithoutScale(OtherIndexer):
    def hadamard(self, x):
        return (super().hadamard(x).float() * 128**0.5).to(torch.bfloat16)


class HadamardInBf16(OtherIndexer):
    """Rounds after every pass."""

    def hadamard(self, x):
        y = x
        for bit in range(7):
            pairs = y.view(*x.shape[:-1], -1, 2, 1 << bit)
            y = torch.stack([pairs[..., 0, :] + pairs[..., 1, :], pairs[..., 0, :] - pairs[..., 1, :]], -2).view(x.shape)
        return y * 128**-0.5


class HadamardInAnotherOrder(OtherIndexer):
    """Rows by number of sign changes (Walsh's order)."""

    def hadamard(self, x):
        gray = [i ^ (i >> 1) for i in range(128)]
        return super().hadamard(x)[..., [int(f"{g:07b}"[::-1], 2) for g in gray]]


class PlainScaleForQ(OtherIndexer):
    def quantise_q(self, q_THD):
        scale = q_THD.float().abs().amax(-1).clamp(min=1e-4) / 448
        return (q_THD.float() / scale[..., None]).clamp(-448, 448).to(FP8), scale


class NearestPowerForQ(OtherIndexer):
    """Rounds the exponent where the rule takes the next power of two: half of the rows are clipped."""

    def quantise_q(self, q_THD):
        scale = torch.exp2(torch.round(torch.log2(q_THD.float().abs().amax(-1).clamp(min=1e-4) / 448)))
        return (q_THD.float() / scale[..., None]).clamp(-448, 448).to(FP8), scale


class LowerFloorForQ(OtherIndexer):
    """Keeps a row of zeros finite by another constant."""

    def quantise_q(self, q_THD):
        scale = torch.exp2(torch.ceil(torch.log2(q_THD.float().abs().amax(-1).clamp(min=1e-12) / 448)))
        return (q_THD.float() / scale[..., None]).clamp(-448, 448).to(FP8), scale


class CoarseValuesForQ(OtherIndexer):
    """e5m2: two bits after the first instead of three."""

    def quantise_q(self, q_THD):
        _, scale = super().quantise_q(q_THD)
        return (q_THD.float() / scale[..., None]).to(torch.float8_e5m2).float().to(FP8), scale


class PowerOfTwoScaleForK(OtherIndexer):
    """ue8m0, as DeepSeek's own reference has it for both."""

    def quantise_k(self, k_ND):
        return self.quantise_q(k_ND)


class OneScaleForAllKeys(OtherIndexer):
    def quantise_k(self, k_ND):
        scale = (k_ND.float().abs().max() / 448).expand(len(k_ND))
        return (k_ND.float() / scale[:, None]).to(FP8), scale


class ScaleForAnotherFp8(OtherIndexer):
    """240 is the largest value of e4m3fnuz."""

    def quantise_k(self, k_ND):
        scale = k_ND.float().abs().amax(-1).clamp(min=1e-4) / 240
        return (k_ND.float() / scale[:, None]).to(FP8), scale


class KScaleInBf16(OtherIndexer):
    def quantise_k(self, k_ND):
        values, scale = super().quantise_k(k_ND)
        return values, scale.to(torch.bfloat16).float()


class CoarseValuesForK(OtherIndexer):
    """e5m2: every value within one step of the right one, and nearly half of them one step off."""

    def quantise_k(self, k_ND):
        _, scale = super().quantise_k(k_ND)
        return (k_ND.float() / scale[:, None]).to(torch.float8_e5m2).float().to(FP8), scale


class TruncatesK(OtherIndexer):
    """Rounds to zero."""

    def quantise_k(self, k_ND):
        _, scale = super().quantise_k(k_ND)
        mantissa, exponent = torch.frexp(k_ND.float() / scale[:, None])
        return torch.ldexp((mantissa * 16).trunc() / 16, exponent).to(FP8), scale


class GatesWithoutQScale(OtherIndexer):
    def head_gates(self, x_TX, q_scale_TH):
        return super().head_gates(x_TX, torch.ones_like(q_scale_TH))


class GatesWithoutHeads(OtherIndexer):
    """Leaves out H^-0.5: scores grow alike and the selection stays."""

    def head_gates(self, x_TX, q_scale_TH):
        return super().head_gates(x_TX, q_scale_TH) * self.dims.num_heads**0.5


class GatesInBf16(OtherIndexer):
    def head_gates(self, x_TX, q_scale_TH):
        return super().head_gates(x_TX, q_scale_TH).to(torch.bfloat16).float()


class GatesAreSoftmax(OtherIndexer):
    def head_gates(self, x_TX, q_scale_TH):
        return (x_TX.float() @ self.weights.weights_proj.float().T).softmax(-1) * q_scale_TH


class NoRelu(OtherIndexer):
    def logits(self, q_values, k_values, k_scale, gates_TH):
        return torch.einsum("thd,th,nd->tn", q_values.float(), gates_TH, k_values.float()) * k_scale


class ReluOfTheSum(NoRelu):
    def logits(self, q_values, k_values, k_scale, gates_TH):
        return super().logits(q_values, k_values, k_scale, gates_TH).relu()


class NoKScale(OtherIndexer):
    def logits(self, q_values, k_values, k_scale, gates_TH):
        return super().logits(q_values, k_values, torch.ones_like(k_scale), gates_TH)


class KScaleOfTheNextKey(OtherIndexer):
    def logits(self, q_values, k_values, k_scale, gates_TH):
        return super().logits(q_values, k_values, k_scale.roll(1), gates_TH)


class LogitsInBf16(OtherIndexer):
    def logits(self, q_values, k_values, k_scale, gates_TH):
        return super().logits(q_values, k_values, k_scale, gates_TH).to(torch.bfloat16).float()


class LosesTheLastHead(OtherIndexer):
    def logits(self, q_values, k_values, k_scale, gates_TH):
        return super().logits(q_values[:, :-1], k_values, k_scale, gates_TH[:, :-1])


class EndsOneKeyEarly(OtherIndexer):
    def select(self, logits_TN, ks_T, ke_T):
        return topk_rows(logits_TN, ks_T, ke_T - 1, self.dims.topk)


class SeesOneKeyTooFar(OtherIndexer):
    """The key after its own: a token sees the next one, or another request's first."""

    def select(self, logits_TN, ks_T, ke_T):
        padded = torch.cat([logits_TN, torch.full_like(logits_TN[:, :1], 1e3)], 1)
        return topk_rows(padded, ks_T, ke_T + 1, self.dims.topk)


class StartsAtThePack(OtherIndexer):
    """Ignores ks: sees the requests packed before its own."""

    def select(self, logits_TN, ks_T, ke_T):
        return topk_rows(logits_TN, torch.zeros_like(ks_T), ke_T, self.dims.topk)


class GivesPackedIndexes(OtherIndexer):
    """Forgets to count from ks."""

    def select(self, logits_TN, ks_T, ke_T):
        chosen = super().select(logits_TN, ks_T, ke_T)
        return torch.where(chosen >= 0, chosen + ks_T[:, None], chosen)


class SelectsOneTwice(OtherIndexer):
    def select(self, logits_TN, ks_T, ke_T):
        chosen = super().select(logits_TN, ks_T, ke_T)
        chosen[-1, 1] = chosen[-1, 0]
        return chosen


class SelectsOneTooFew(OtherIndexer):
    def select(self, logits_TN, ks_T, ke_T):
        chosen = super().select(logits_TN, ks_T, ke_T)
        chosen[:, -1] = -1
        return chosen


class PadsWithZeros(OtherIndexer):
    def select(self, logits_TN, ks_T, ke_T):
        return super().select(logits_TN, ks_T, ke_T).clamp(min=0)


class PadsInFront(OtherIndexer):
    def select(self, logits_TN, ks_T, ke_T):
        return super().select(logits_TN, ks_T, ke_T).flip(1)


class SelectsTheNewest(OtherIndexer):
    """A window of the last K keys: every row in form, none of them right."""

    def select(self, logits_TN, ks_T, ke_T):
        return super().select(torch.arange(logits_TN.shape[1]).expand_as(logits_TN).float(), ks_T, ke_T)


class SelectsTheWorst(OtherIndexer):
    def select(self, logits_TN, ks_T, ke_T):
        return super().select(-logits_TN, ks_T, ke_T)


class GetsOneKeyWrong(OtherIndexer):
    """One row has its lowest key in the place of its highest: no matter of recall."""

    def select(self, logits_TN, ks_T, ke_T):
        chosen = super().select(logits_TN, ks_T, ke_T)
        row = int((ke_T - ks_T).argmax())
        chosen[row, 0] = int(logits_TN[row, int(ks_T[row]) : int(ke_T[row])].argmin())
        return chosen


STAGE_MUTANTS: dict[type[OtherIndexer], set[str]] = {
    ProjectsHeadsAcross: {"project_q"},
    AccumulatesInFp16: {"project_q", "project_k"},
    AccumulatesInBf16: {"project_q", "project_k"},
    NormWithoutBias: {"norm_k"},
    NormWithoutMean: {"norm_k"},
    NormOfASample: {"norm_k"},
    NormWithTorchsEps: {"norm_k"},
    NormInBf16: {"norm_k"},
    OtherRopeStyle: {"rope_q", "rope_k"},
    KeysShiftedByOne: {"rope_k"},
    QueriesAtLocalPositions: {"rope_q"},
    TurnsBackwards: {"rope_q", "rope_k"},
    TurnsTheLastDims: {"rope_q", "rope_k"},
    PositionsInBf16: {"rope_q", "rope_k"},
    TwiceTheTheta: {"rope_q", "rope_k"},
    WithoutYarn: {"rope_q", "rope_k"},
    NoHadamardOnQ: {"hadamard_q"},
    NoHadamardOnK: {"hadamard_k"},
    HadamardWithoutScale: {"hadamard_q", "hadamard_k"},
    HadamardInBf16: {"hadamard_q", "hadamard_k"},
    HadamardInAnotherOrder: {"hadamard_q", "hadamard_k"},
    PlainScaleForQ: {"quantise_q.scale", "quantise_q.values"},
    NearestPowerForQ: {"quantise_q.scale", "quantise_q.values"},
    LowerFloorForQ: {"quantise_q.scale"},
    CoarseValuesForQ: {"quantise_q.values"},
    PowerOfTwoScaleForK: {"quantise_k.scale", "quantise_k.values", "quantise_k.differing"},
    OneScaleForAllKeys: {"quantise_k.scale", "quantise_k.values", "quantise_k.differing"},
    ScaleForAnotherFp8: {"quantise_k.scale", "quantise_k.values", "quantise_k.differing"},
    KScaleInBf16: {"quantise_k.scale"},
    CoarseValuesForK: {"quantise_k.differing"},
    TruncatesK: {"quantise_k.differing"},
    GatesWithoutQScale: {"head_gates"},
    GatesWithoutHeads: {"head_gates"},
    GatesInBf16: {"head_gates"},
    GatesAreSoftmax: {"head_gates"},
    NoRelu: {"logits"},
    ReluOfTheSum: {"logits"},
    NoKScale: {"logits"},
    KScaleOfTheNextKey: {"logits"},
    LogitsInBf16: {"logits"},
    LosesTheLastHead: {"logits"},
}
"""Each mutant with the gates that have to fail; all others have to pass."""

FORM_MUTANTS: dict[type[OtherIndexer], str] = {
    EndsOneKeyEarly: "the number of indexes",
    SeesOneKeyTooFar: "an index outside [0, length)",
    GivesPackedIndexes: "an index outside [0, length)",
    StartsAtThePack: "an index outside [0, length)",
    SelectsOneTwice: "an index twice",
    SelectsOneTooFew: "the number of indexes",
    PadsWithZeros: "padding before an index or not -1",
    PadsInFront: "padding before an index or not -1",
}
"""Selections that break a rule of form, with the rule."""

CHOICE_MUTANTS: tuple[type[OtherIndexer], ...] = (SelectsTheNewest, SelectsTheWorst, GetsOneKeyWrong)
"""Selections in form, of the wrong keys."""

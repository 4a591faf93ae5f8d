"""The models by name: each is an estimator behind the one interface of :mod:`dask_influence.influence`."""

from __future__ import annotations

from dask_influence.core.estimators import (
    Arnoldi,
    Cg,
    DataInf,
    Direct,
    Ekfac,
    GradientDot,
    Lissa,
    NystroemSketch,
)
from dask_influence.influence import InfluenceFunctionModel


class DirectInfluence(InfluenceFunctionModel, estimator=Direct):
    """Influence through the exact curvature, a dense P × P matrix that is factorised once.

    One pass over the data; 8 P² bytes on each worker. Arguments and methods are those of
    :class:`InfluenceFunctionModel`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import DirectInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randn(7, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> infl = DirectInfluence(net, torch.nn.functional.mse_loss, 0.1).fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])
    >>> infl.influences(x[:2], y[:2], x, y, mode="perturbation").shape
    torch.Size([2, 7, 3])
    """


class ArnoldiInfluence(InfluenceFunctionModel, estimator=Arnoldi):
    """Influence through the R eigenpairs of largest magnitude of the curvature.

    Scores are (g_test V)(Λ + λ)⁻¹(V g_train): the training side needs directional
    derivatives along R vectors and never forms a gradient. ``complement=True`` keeps the
    rest of the space with eigenvalue λ. Arguments beside those of
    :class:`InfluenceFunctionModel` are those of :class:`~dask_influence.core.estimators.Arnoldi`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import ArnoldiInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randn(7, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> infl = ArnoldiInfluence(net, torch.nn.functional.mse_loss, 0.1, rank=2).fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])

    References
    ----------
    Schioppa et al. 2022, "Scaling Up Influence Functions".
    """


class CgInfluence(InfluenceFunctionModel, estimator=Cg):
    """Influence through conjugate gradient: each factor solves (C + λI) s = g by passes over the data.

    Nothing of size P² is formed; test points of one block share every pass. A factor is done
    when its true relative residual is below ``rtol``; what does not get there is reported by a
    :class:`~dask_influence.errors.ConvergenceWarning`, in ``diagnostics`` and in
    ``factor_residual`` (``strict=True`` raises). Where C + λI turns out indefinite the rest is
    solved by MINRES, with the warning that names the λ that cures it. Arguments beside those of
    :class:`InfluenceFunctionModel` are those of :class:`~dask_influence.core.estimators.Cg`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import CgInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randn(7, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> infl = CgInfluence(net, torch.nn.functional.mse_loss, 0.1, preconditioner="jacobi").fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])
    >>> infl.diagnostics["worst_residual"] < 1e-4
    True

    References
    ----------
    Ji & Li 2017, "A breakdown-free block conjugate gradient method"; Frangella, Tropp & Udell
    2023, "Randomized Nyström Preconditioning".
    """


class LissaInfluence(InfluenceFunctionModel, estimator=Lissa):
    """Influence through LiSSA: each factor is a Neumann series over seeded draws of the data.

    The series is restarted on the true residual, so that it converges to the exact factor
    (with ``dampen``, to that of λ + dampen·scale). A series that diverges raises
    :class:`~dask_influence.errors.ConvergenceError`, naming the setting that cures it.
    :class:`CgInfluence` reaches the same factors in fewer passes; the draws of a step are
    cheaper than a pass where there are very many samples. Arguments beside those of
    :class:`InfluenceFunctionModel` are those of :class:`~dask_influence.core.estimators.Lissa`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import LissaInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randn(7, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> infl = LissaInfluence(net, torch.nn.functional.mse_loss, 0.1, rtol=1e-3).fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])
    >>> infl.diagnostics["worst_residual"] <= 1e-3
    True

    References
    ----------
    Agarwal, Bullins & Hazan 2017, "Second-Order Stochastic Optimization for Machine Learning
    in Linear Time"; Koh & Liang 2017, section 3.
    """


class NystroemSketchInfluence(InfluenceFunctionModel, estimator=NystroemSketch):
    """Influence through a randomised low-rank approximation of the curvature, from one pass.

    Ĉ = Y (Ωᵀ Y)⁺ Yᵀ with Y = C Ω; the orthogonal complement is kept with eigenvalue λ, so
    that λ must be positive. Meant for curvatures without negative eigenvalues. Arguments
    beside those of :class:`InfluenceFunctionModel` are those of
    :class:`~dask_influence.core.estimators.NystroemSketch`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import NystroemSketchInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randn(7, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> infl = NystroemSketchInfluence(net, torch.nn.functional.mse_loss, 0.1, rank=2).fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])

    References
    ----------
    Frangella, Tropp & Udell 2023, "Randomized Nyström Preconditioning"; Hataya & Yamada 2023,
    "Nyström Method for Accurate and Scalable Implicit Differentiation".
    """


class EkfacInfluence(InfluenceFunctionModel, estimator=Ekfac):
    """Influence through the Fisher matrix in a Kronecker-factored eigenbasis, block by layer.

    Two passes over the data and, for a layer of q outputs and p inputs, matrices of q × q and
    p × p instead of pq × pq. Scores are those of the Fisher matrix under the model's own
    predictions (or of the empirical one with ``curvature="empirical_fisher"``): for any other
    ``curvature`` it stands in for that matrix, and ``factor_residual`` says how well. λ is added to each
    eigenvalue. Linear, convolution, Embedding and attention layers and norms (batch, group,
    instance, layer, RMS) have a form; others are refused by name, or left out with
    ``skip_unsupported=True``. Arguments beside those of :class:`InfluenceFunctionModel` are those of
    :class:`~dask_influence.core.estimators.Ekfac`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import EkfacInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randint(0, 2, (7,))
    >>> net = torch.nn.Linear(3, 2)
    >>> infl = EkfacInfluence(net, torch.nn.functional.cross_entropy, 0.1).fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])
    >>> infl.diagnostics["passes"]
    2

    References
    ----------
    George et al. 2018, "Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis"; Grosse et al. 2023, "Studying Large Language Model Generalization with
    Influence Functions".
    """


class InverseHarmonicMeanInfluence(InfluenceFunctionModel, estimator=DataInf):
    """DataInf: influence through the mean over training points j of (g_j g_jᵀ + λI)⁻¹, by layer.

    No pass to fit, one pass over the training data for each block of factors. Arguments
    beside those of :class:`InfluenceFunctionModel` are those of
    :class:`~dask_influence.core.estimators.DataInf`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import InverseHarmonicMeanInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randn(7, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> infl = InverseHarmonicMeanInfluence(net, torch.nn.functional.mse_loss, 0.1).fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])

    References
    ----------
    Kwon et al. 2023, "DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs and
    Diffusion Models".
    """


class GradientDotInfluence(InfluenceFunctionModel, estimator=GradientDot):
    """The baseline without curvature: ⟨g_test, g_train⟩.

    λ is recorded and not used. What an estimator adds to this is what its curvature is worth.
    Arguments and methods are those of :class:`InfluenceFunctionModel`.

    Examples
    --------
    >>> import torch
    >>> from dask_influence import GradientDotInfluence
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(7, 3), torch.randn(7, 1)
    >>> net = torch.nn.Linear(3, 1)
    >>> infl = GradientDotInfluence(net, torch.nn.functional.mse_loss).fit((x, y))
    >>> infl.influences(x[:2], y[:2], x, y).shape
    torch.Size([2, 7])

    References
    ----------
    Pruthi et al. 2020, "Estimating Training Data Influence by Tracing Gradient Descent".
    """

"""The words of plans and what they stand for: a concept has many names, so that synonyms need not list each.

Names are told by their stems (`text.stem`); one of several words is read before those of fewer.
"""

from __future__ import annotations

from functools import cache

from deme_diffusion.ablate.text import normalised, words

CONCEPTS: dict[str, str] = {
    "time": "timestep, t step, diffusion step, denoising step, noising step, noise level, noise scale, "
    "noise intensity, diffusion time, time, temporal, step wise, noise regime, denoising stage, noise stage, "
    "timestep space, time axis",
    "range": "range, interval, subset, segment, chunk, bucket, subrange, subinterval, window, band, region, "
    "slice, zone",
    "split": "division, divide, dividing, grouping, group, partition, repartition, split, splitting, "
    "segmentation, segmenting, binning, discretization, stratification, subdivision, subdivide, partitioning",
    "boundary": "boundary, edge, cut point, cutoff, breakpoint, cut, border, split point, cut off, threshold",
    "overlap": "overlapping, overlap, sliding window, intersecting, nondisjoint",
    "cluster": "cluster, clustering, k means, kmeans",
    "uniform": "uniform, equal, equally, even, evenly, equidistant, equal width, uniformly, equal size, same size",
    "nonuniform": "nonuniform, uneven, unequal, unevenly, variable width, varying width, variable size, "
    "nonequal, nonuniformly, unequally, irregular, heterogeneous, different width, different size, varying size, "
    "variable length, asymmetric, imbalanced",
    "random": "random, randomly, arbitrary, randomized, at random, shuffled, shuffling, arbitrarily, randomness",
    "assign": "assignment, assign, permutation, noncontiguous, scattered, noncontiguously, allocate, "
    "individual timestep, allocation, noncontinuous, noncontiguity",
    "adaptive": "adaptive, dynamic, data driven, learned boundary, adaptively, automatic",
    "logarithmic": "logarithmic, log spaced, exponential, geometric, quadratic, logarithmically",
    "finer": "finer, denser, coarser, more fine grained, smaller range, larger range, narrower, wider, skewed, "
    "biased, concentrated, more frequent",
    "gradient": "gradient, gradient conflict, gradient similarity, cosine similarity, gradient cosine, conflict, "
    "gradient interference, task affinity, task similarity, interference, gradient alignment, affinity",
    "contiguous": "contiguous, nonoverlapping, disjoint, mutually exclusive, consecutive",
    "snr": "snr, signal to noise ratio, signal to noise, log snr, logsnr",
    "expert": "expert, specialist, specialized model, finetuned model, decoupled model, separate model, "
    "individual model, multiple model, submodel, branch, timestep specific model, range specific model, "
    "multimodel, specific model, several model, task specific model, finetuned network, specialized network, "
    "separate network, independent model",
    "number": "number, count, amount, quantity, granularity, how many, num, cardinality, total number, few, "
    "more, fewer",
    "nsymbol": "n",
    "single": "single, one model, single model, unified model, monolithic, joint, jointly, joint training, "
    "one network, single network, all in one, shared model, standard finetuning, vanilla finetuning, "
    "conventional finetuning, traditional finetuning, full finetuning, naive finetuning, standard training, "
    "regular finetuning, one single model, conventional training, vanilla training, traditional training, "
    "unified training, single diffusion model, joint model, direct finetuning, plain finetuning, "
    "all timestep model, unified finetuning",
    "decouple": "decouple, decoupled, decoupling, decoupled training, decoupled finetuning, disentangle, "
    "separately, separate training, separate finetuning, independent training, independent finetuning, "
    "specialization, independently, range specific, timestep specific, range wise, isolated training, "
    "decouple then merge",
    "finetuning": "finetuning, finetune, finetuned",
    "training": "training, train, trained, learning",
    "merge": "merge, merging, merger, fusion, fuse, combine, combination, combining, aggregate, aggregation, "
    "consolidate, consolidation, unify, unification, recombine, recombination, blending, blend, merged model, "
    "integration, integrate, single merged model, merged single model, merge into single model, "
    "parameter fusion, weight merging, parameter merging, amalgamation, weight fusion",
    "taskvector": "task vector, delta weight, weight delta, parameter delta, weight difference, task arithmetic vector",
    "taskarithmetic": "task arithmetic, linear merging, linear combination of task vectors, "
    "task vector addition, task vector arithmetic, task vector summation, weighted sum, linear combination, "
    "weighted sum of task vectors",
    "average": "averaging, average, mean, model soup, weight averaging, parameter averaging, simple averaging, "
    "soup, uniform averaging, model averaging, arithmetic mean, naive averaging, uniform soup, parameter mean, "
    "mean of weights, linear averaging, averaged, simple average, arithmetic average, fedavg, plain averaging, "
    "simple weight averaging",
    "weightedaverage": "weighted average, weighted averaging, weighted mean, weighted combination",
    "ties": "ties, ties merging, trim elect sign merge, trim elect sign and merge, trim elect merge, "
    "sign election, trim elect sign disjoint merge, ties merge",
    "dare": "dare, drop and rescale, dare merging, drop rescale, random dropping, dare linear",
    "dareties": "dare ties, ties dare, dare with ties, dare and ties combined",
    "breadcrumbs": "breadcrumb, model breadcrumb, outlier removal",
    "della": "della, magprune, della merging, magnitude sampling",
    "slerp": "slerp, spherical linear interpolation, spherical interpolation, spherical",
    "fisher": "fisher, fisher information, fisher weighted, fisher merging, fisher weighted averaging, "
    "fisher information matrix, fisher averaging",
    "tsv": "tsv, task singular vector, tsv merge, singular vector, tsvm",
    "isoc": "isoc, isotropic merging, isotropic, isotropic model merging, iso",
    "wudi": "wudi, wudi merging, interference minimization, wudi merge",
    "othermerge": "regmean, adamerging, zipit, git rebasin, rebasin, emr merging, pcb merging, lorahub, "
    "optimal transport, permutation alignment, otfusion, neuron alignment, consensus merging, model stock, "
    "twin merging, stitching, parameter selection, selective merging, sequential merging, hierarchical merging, "
    "progressive merging, pairwise merging, gradual merging, iterative merging, max pooling, weight pruning, "
    "pruning, low rank merging, nonlinear merging, nonlinear combination, attention based merging, hypernetwork, "
    "knowledge amalgamation",
    "ensemble": "ensemble, ensembling, routing, route, router, mixture of experts, moe, switching, switch, "
    "timestep wise ensemble, timestep dependent selection, expert selection, no merge, unmerged, nomerge, "
    "per range model, output averaging, keep separate, model switching, serve separately, keep separately, "
    "used separately, before merge",
    "interpolation": "interpolation, interpolate, linear interpolation, lerp",
    "weight": "weight, coefficient, scaling factor, scalar, scaling coefficient, scaling, weighting, ratio, "
    "proportion, lambda coefficient, weighting coefficient",
    "lambda": "lambda, lam",
    "search": "search, searching, selection, determination, search strategy, search method, tune, tuning, "
    "hyperparameter search, optimization, optimal, find, optimizing",
    "grid": "grid, grid search, exhaustive search, brute force",
    "leastsquares": "least square, closed form, analytic, analytical, normal equation, closed form solution, "
    "linear regression, ridge regression, regression",
    "learned": "learned, learnable, gradient descent, gradient based, backpropagation, trainable, adam, sgd, "
    "gradient based optimization, differentiable, end to end, test time adaptation, stochastic gradient descent, "
    "gradient optimized, gradient descent optimization, learning based",
    "cmaes": "cma es, cmaes, evolutionary, evolution strategy, evolutionary search, genetic, genetic algorithm, "
    "evolutionary algorithm, evolution, covariance matrix adaptation, evolutionary optimization",
    "tpe": "tpe, bayesian, bayesian optimization, optuna, parzen, hyperopt, gaussian process, bayesian search",
    "randomsearch": "random search, simulated annealing, reinforcement learning, particle swarm, hill climbing, "
    "coordinate descent, greedy, greedy search, greedy soup",
    "layerwise": "layer wise, per layer, layerwise, layer specific, each layer, layer level",
    "blockwise": "block wise, per block, blockwise, module wise, block level, block specific",
    "techniques": "training technique, finetuning technique, three technique, all technique, proposed technique, "
    "technique for finetuning, training trick, auxiliary technique, training strategy, training enhancement, "
    "all three",
    "prob": "probabilistic, probability, stochastic, probabilistically, sampling probability, "
    "probabilistic sampling, sampling ratio, mixing probability, stochastically, sampling proportion, bernoulli, "
    "coin, mixing ratio",
    "psymbol": "p",
    "global": "global, full range, entire range, all timestep, whole range, full timestep range, outside, "
    "out of range, complete range, entire timestep, whole timestep, every timestep, full timestep, overall, "
    "all step, globally, cross range, other range, entire set, entire diffusion process, complete timestep, "
    "all range, full diffusion",
    "own": "own, own range, strict, strictly, deterministic, local, only within, within, restricted, designated, "
    "exclusively, in range, hard, respective, specific range, only, fixed range, range restricted",
    "samplingt": "sampling, sample, sampled, draw, drawn",
    "always": "always, only global, purely global, fully global",
    "consistency": "consistency, knowledge preservation, self consistency, output consistency, "
    "prediction consistency, preservation, knowledge retention, forgetting, knowledge preserving, preserving",
    "distill": "distillation, distill, knowledge distillation, self distillation",
    "teacher": "teacher, frozen model, reference model, original model, teacher model, anchor, target network",
    "student": "student",
    "loss": "loss, objective, penalty, regularization, regularizer, loss function, loss term, criterion, "
    "regularisation, constraint, loss component, regularization term, regularizing",
    "projection": "projection, projector, projection layer, projection matrix, onebyone convolution, "
    "onebyone conv, projection module, linear projection, feature projection, projecting, onebyone, "
    "channel mixing, channel mixer, projection head, feature transformation, transformation matrix",
    "channel": "channel, channel wise, channel dimension, channelwise, per channel, across channel",
    "spatial": "spatial, spatial wise, spatial dimension, depthwise, depthwise convolution, threebythree, "
    "threebythree convolution, threebythree conv, spatially, pixel wise, pixelwise, patch wise, depthwise conv, "
    "spatial domain",
    "both": "both, jointly channel and spatial, full, alongside, addition, additional, beside, hybrid, "
    "simultaneously, plus",
    "residual": "residual, residual branch, resnet, foldable, residual block, skip connection, residual connection",
    "block": "block, every block, each block, all block, block output, after block, after every block",
    "identity": "identity, identity mapping, identity init",
    "init": "initialization, initialize, init, initial weight, starting point, warm start, initial parameter, "
    "reinitialization, initial checkpoint, start, begin, starting weight, pretrained initialization",
    "pretrained": "pretrained, pretraining, pretrain, pretrained model, pretrained weight, pretrained checkpoint",
    "scratch": "scratch, from scratch, random initialization, randomly initialized, random init, random weight, "
    "random starting point, reinitialized, training from scratch, kaiming, xavier, he initialization, "
    "gaussian init",
    "partly": "partly, partial, partially, half of layers, some layers, subset of layers, half layers, "
    "share of layers, some blocks, last layers, few layers",
    "ema": "ema, exponential moving average, moving average, polyak, ema weight, weight ema, "
    "exponential average, polyak averaging, exponential moving averaging",
    "decay": "decay, decay rate, rate, momentum, ema decay, smoothing",
    "lossweighting": "loss weighting, loss reweighting, reweighting, loss weight, timestep weighting, "
    "snr weighting, timestep loss weighting, weighting function, weighting scheme, weighting strategy, "
    "loss rescaling, reweight, weighting of loss, loss weighting strategy, loss reweight, weighted loss, "
    "timestep dependent weighting, weighted objective, objective weighting, importance weighting, loss scaling",
    "minsnr": "minsnr, minsnr gamma, min signal to noise, minimum snr, minsnr weighting",
    "ptwo": "ptwo, perception prioritized, perception prioritised, perceptual prioritized",
    "truncatedsnr": "truncated snr, truncate snr, clipped snr, snr truncation, clamped snr",
    "snrplusone": "snrplusone",
    "constantweight": "constant weighting, no weighting, uniform weighting, simple loss, lsimple, unweighted, "
    "constant weight",
    "uncertainty": "uncertainty, uncertainty weighting, homoscedastic, homoscedastic uncertainty, ant uw, uw, "
    "kendall, uncertainty based weighting, uncertainty weighted",
    "nash": "nash, nashmtl, nash mtl, nash bargaining, ant nash, ant nashmtl, bargaining",
    "multitask": "multitask, multitask learning, mtl, multitask weighting, ant, task weighting, multitask optimization",
    "othermtl": "pcgrad, cagrad, mgda, gradnorm, gradient surgery, dynamic weight averaging, dwa, imtl, "
    "graddrop, gradient projection, conflict averse, rlw, famo, gradient normalization, "
    "projecting conflicting gradient",
    "lr": "learning rate, lr, step size, range learning rate",
    "schedule": "learning rate schedule, lr schedule, learning rate scheduler, lr scheduler, "
    "learning rate decay, lr decay, annealing, learning rate annealing, warmup, learning rate warmup",
    "cosine": "cosine, cosine annealing, cosine decay, cosine schedule",
    "linear": "linear, linear decay, linear schedule, linearly",
    "constant": "constant, fixed, constant schedule, constant learning rate",
    "length": "training length, training step, training iteration, iteration, finetuning step, "
    "finetuning iteration, training duration, training budget, epoch, number of update, finetuning duration, "
    "finetuning budget, gradient step, optimization step, update step, number of updates, training time budget, "
    "compute budget, finetuning length, training epoch, iter, budget, longer training, shorter training, "
    "optimization iteration, number of step, training schedule length, training compute, "
    "finetuning schedule length, finetuning schedule",
    "batch": "batch size, batch, minibatch, minibatch size",
    "sampler": "sampler, solver, sampling method, sampling algorithm, ode solver, sde solver, "
    "inference scheduler, noise scheduler, inference sampler, sampling scheduler, scheduler, "
    "reverse process solver, sampling scheme, numerical solver, inference sampling, generation sampler, "
    "denoising sampler",
    "samplingsteps": "sampling step, inference step, number of denoising steps, nfe, "
    "number of function evaluation, function evaluation, number of sampling step, generation step, reverse step, "
    "number of inference step, ddim step, sampler step, denoising iteration, number of diffusion steps",
    "ddim": "ddim, denoising diffusion implicit",
    "ddpm": "ddpm, ddpm sampler, ancestral sampling, ddpm sampling",
    "dpmsolver": "dpmsolver, dpmsolverpp, dpm solver, dpmsolver multistep, dpmsolvermultistep",
    "singlestep": "singlestep, dpmsolversinglestep",
    "euler": "euler, euler discrete, euler method, eulerdiscrete",
    "eulera": "euler ancestral, eulerancestral",
    "heun": "heun, heun method, heundiscrete",
    "unipc": "unipc, uni pc",
    "pndm": "pndm, plms, pseudo numerical",
    "lms": "lms, linear multistep",
    "deis": "deis",
    "kdpm": "kdpm",
    "eta": "eta",
    "antithetic": "antithetic, mirrored, antithetic sampling, mirrored pair, antithetic timestep, variance reduction",
    "perbatch": "per batch, batch level, batch wise, each batch, whole batch, batchwise",
    "persample": "per sample, sample level, sample wise, each sample, samplewise",
    "gamma": "gamma",
}
"""Concept -> its names: what the parts table speaks of."""

FOREIGN: dict[str, str] = {
    "unet": "unet, backbone, architecture, network architecture, dit, transformer, model architecture, encoder, "
    "decoder, unet backbone, attention, self attention, cross attention, depth, network width, model size, "
    "mid block, model capacity, residual architecture, normalization, group norm, layer norm, batch norm, "
    "dropout, activation, activation function, attention layer, skip connection design, squeeze and excitation, "
    "timestep embedding, time embedding, positional embedding, position encoding, positional encoding, embedding",
    "adapter": "lora, adapter, low rank adaptation, low rank, parameter efficient, peft, prompt tuning, bitfit, "
    "low rank adapter, parameter efficient finetuning, controlnet, hypernet",
    "data": "dataset, training data, data augmentation, augmentation, corpus, resolution, image resolution, "
    "cifar, lsun, imagenet, coco, laion, celeba, ffhq, training set, data set, image size, data, domain, "
    "celebahq, mscoco",
    "textencoder": "text encoder, clip, caption, prompt, text conditioning, text prompt, t5, language model, "
    "text, clip encoder, clip text encoder, prompt engineering, class conditioning, class label, conditioning, "
    "clip model",
    "guidance": "guidance, classifier free guidance, classifier free guidance scale, guidance scale, cfg, "
    "classifier guidance, cfg scale, negative prompt, guidance strength",
    "latent": "latent space, vae, autoencoder, latent, latent diffusion, pixel space, tokenizer",
    "noiseschedule": "noise schedule, beta schedule, variance schedule, noising schedule, diffusion schedule, "
    "forward process, noise scheduling, forward diffusion, cosine noise schedule, noise type, "
    "number of timesteps t",
    "prediction": "epsilon prediction, v prediction, velocity prediction, x0 prediction, prediction type, "
    "noise prediction, parameterization, prediction target, flow matching, rectified flow, score matching, "
    "prediction objective, parametrization",
    "optimizer": "optimizer, adamw, weight decay, gradient clipping, adagrad, lion, rmsprop, momentum sgd, "
    "mixed precision, optimiser, gradient accumulation, gradient norm clipping, precision",
    "otherloss": "perceptual loss, lpips loss, adversarial loss, l1 loss, kl divergence, huber loss, gan, "
    "discriminator, contrastive loss, cosine loss, cosine similarity loss, feature matching, feature level, mse, "
    "l2 loss, kl, elastic weight consolidation, ewc, l2 regularization, l2sp, contrastive, intermediate feature, "
    "feature distillation, smooth l1, jensen shannon, mean squared error, mean absolute error, mmd, triplet, "
    "focal loss",
    "curriculum": "curriculum, curriculum learning, progressive training, sequential training, alternating, "
    "sequential finetuning, continual learning, reinforcement, replay, meta learning, maml, training order",
    "pruningq": "quantization, model compression, sparsity, knowledge graph, compression",
    "fewsteps": "consistency model, consistency distillation, consistency training, latent consistency, "
    "progressive distillation, adversarial distillation, lcm",
    "pretraining": "pretraining stage, pretraining duration, pretraining data, base model, foundation model, "
    "stable diffusion version, stable diffusion, sdxl, choice of base model, backbone model",
}
"""What plans ask for and no setting of this method is, in the same form."""

NEUTRAL = (
    "held out data, held out set, validation set, validation data, held out, "
    "a, an, the, of, for, in, on, to, with, by, from, into, at, as, and, or, its, their, this, that, these, each, "
    "is, are, be, it, our, your, all, every, any, not, no, without, remove, removing, removal, drop, ablate, "
    "ablation, disable, use, using, usage, used, apply, applying, replace, replacing, replacement, swap, change, "
    "vary, varying, effect, impact, influence, role, study, analysis, importance of, contribution, effectiveness, "
    "necessity, evaluate, test, compare, method, technique, strategy, approach, scheme, mechanism, procedure, "
    "algorithm, module, component, design, choice, setting, configuration, part, element, model, network, "
    "diffusion, denoising, deme, proposed, different, various, alternative, varied, other, new, standard, simple, "
    "basic, process, stage, phase, value, hyperparameter, parameter, type, kind, form, step, option, instead, "
    "across, between, during, over, based, level, framework, space, parameter space, weight space, adjacent, "
    "neighbouring, neighboring, after, before, under, inside, throughout, within, k, x, m, vs, versus, suchas, "
    "thatis, etc, only, just, also, set, make, do, when, per, via, if, can, will, should, update, mapping, term, "
    "layer, function, sensitivity, current, original, existing, default, explicit, varies, wise, specific, "
    "baseline, uses, paper, system, experiment, variant, version, alternatives, full, entire, final, operation"
)
"""What says nothing of which part is meant."""


@cache
def phrases() -> dict[tuple[str, ...], str]:
    """Stems of each name -> its concept, `` for neutral words; the first of two concepts with one name keeps it."""
    found: dict[tuple[str, ...], str] = {}
    for concept, names in {**CONCEPTS, **FOREIGN, "": NEUTRAL}.items():
        for name in names.split(", "):
            found.setdefault(tuple(words(normalised(name))), concept)
    found.pop((), None)
    return found


@cache
def longest() -> int:
    """Words of the longest name."""
    return max(map(len, phrases()))

"""Words of plans for what experts are finetuned with, and how images are drawn: concept -> its names."""

from __future__ import annotations

TRAINING: dict[str, str] = {
    "techniques": "training technique, finetuning technique, three technique, all technique, proposed technique, "
    "technique for finetuning, training trick, auxiliary technique, training strategy, training enhancement, all "
    "three",
    "prob": "probabilistic, probability, stochastic, probabilistically, sampling probability, probabilistic sampling, "
    "sampling ratio, mixing probability, stochastically, sampling proportion, bernoulli, coin, mixing ratio, chance, "
    "odds, coin flip, flipping a coin, occasionally, occasional, sometimes, exposure, leakage, leak, with "
    "probability, now and then, random mixture, rate of global, sampling rate, fraction of timestep, fraction of "
    "sample, proportion of timestep, share of timestep, proportion of sample, share of sample, random mixing of, "
    "mixing of timestep, random inclusion",
    "psymbol": "p",
    "global": "global, full range, entire range, all timestep, whole range, full timestep range, outside, out of "
    "range, complete range, entire timestep, whole timestep, every timestep, full timestep, overall, all step, "
    "globally, cross range, other range, entire set, entire diffusion process, complete timestep, all range, full "
    "diffusion, beyond, other timestep, any timestep, out of interval, full interval, full trajectory, entire "
    "trajectory, whole trajectory, whole schedule, full schedule, everything, all noise level, every noise level, "
    "elsewhere, entire interval, whole interval, complete interval, foreign timestep, all timesteps, full time axis, "
    "whole time axis, entire time axis, out of segment, all interval, full set of timestep, full set, other "
    "interval, other segment, full timestep interval, outside range, outside interval, outside of range, all t, any "
    "t",
    "own": "own, own range, strict, strictly, deterministic, local, only within, within, restricted, designated, "
    "exclusively, in range, hard, respective, specific range, only, fixed range, range restricted, assigned range, "
    "assigned interval, home range, strictly local, own interval, own segment, own timestep, inside its range, "
    "within its range, assigned timestep, assigned segment, own bin, own window",
    "samplingt": "sampling, sample, sampled, draw, drawn",
    "always": "always, only global, purely global, fully global",
    "consistency": "consistency, knowledge preservation, self consistency, output consistency, prediction "
    "consistency, preservation, knowledge retention, forgetting, knowledge preserving, preserving, stay close, stays "
    "close, staying close, close to, near, nearness, closeness, drift, drifting, deviation, deviate, deviating, "
    "divergence from, diverge, diverging, agree with, agreement, proximity, tether, tethered, pull toward, pulled "
    "toward, pull back, tie to, mimic, imitate, imitation, retention, similar prediction, fidelity, catastrophic "
    "forgetting, remember, remembering, output matching, prediction matching, stay faithful, faithful, output drift, "
    "deviation from, discrepancy, departure from, depart, moving away, move away, pretrained knowledge, prior "
    "knowledge, pretrained capability, pull, pulls, pulling, anchoring, anchored, anchor to",
    "distill": "distill, knowledge distillation, self distillation, distilling, distillation like, distilled",
    "teacher": "teacher, frozen model, reference model, original model, teacher model, anchor, target network, "
    "frozen, original network, base network, frozen copy, pretrained teacher, frozen network, frozen base, original "
    "denoiser, reference network, frozen pretrained model, frozen pretrained network, frozen pretrained denoiser, "
    "frozen original model, original pretrained model, target model, frozen denoiser",
    "frozenteacher": "freezing teacher, freezing of teacher, teacher freezing, freeze teacher, keeping teacher frozen, "
    "keeping teacher fixed, teacher kept frozen, teacher being frozen, frozen state of teacher, freezing teacher "
    "model, freezing teacher network, freezing of teacher model, freezing of teacher network, freezing pretrained "
    "teacher, freezing reference model, freezing of reference model, teacher staying frozen, teacher frozen",
    "student": "student",
    "earlystop": "early stopping, early stop, stop early, stopping early, patience, early stop patience",
    "eightbit": "eightbit",
    "fullbit": "fullbit",
    "raw": "raw, nonaveraged, without averaging, no averaging, no ema, without ema, last iterate, unaveraged, "
    "instantaneous weight, raw weight, raw parameter, nonaveraged weight, not averaged",
    "bounds": "bound, bounds, lower and upper bound, limits, limit",
    "loss": "loss, objective, penalty, regularization, regularizer, loss function, loss term, criterion, "
    "regularisation, constraint, loss component, regularization term, regularizing, penalize, penalizing, penalised, "
    "penalises, auxiliary loss, auxiliary objective, error term, regularise, regularize, regularised, extra term, "
    "extra loss, loss contribution, secondary loss, additional loss, noise prediction mse, noise prediction loss, "
    "noise prediction error, denoising mse",
    "projection": "projection, projector, projection layer, projection matrix, onebyone convolution, onebyone conv, "
    "projection module, linear projection, feature projection, projecting, onebyone, channel mixing, channel mixer, "
    "projection head, feature transformation, transformation matrix, linear map, linear transform, linear layer, "
    "linear transformation, learnable transform, transform, transformation, matrix, matrices, channelmatrix, mixing "
    "matrix, conv, convolution, convolutional layer, linear mixing, linear operator, learned map, learnable map, "
    "learned matrix, learnable matrix, feature map transform, projectors, projected, mixing layer, mixing module, "
    "feature mixing",
    "channel": "channel, channel wise, channel dimension, channelwise, per channel, across channel, over channel, "
    "along channel, channelmatrix, feature channel, across the channel, between channel, mixing channel, channel "
    "direction, channel axis",
    "spatial": "spatial, spatial wise, spatial dimension, depthwise, depthwise convolution, threebythree, "
    "threebythree convolution, threebythree conv, spatially, pixel wise, pixelwise, patch wise, depthwise conv, "
    "spatial domain, spatial position, hxw, per pixel, spatial location, spatial extent, spatial mixing, spatial "
    "axis, spatial direction, over position, pixel position, height and width, space instead of channel",
    "both": "both, jointly channel and spatial, full, alongside, addition, additional, beside, hybrid, "
    "simultaneously, plus, together with, combined with, joint, at once, on top of",
    "residual": "residual, residual branch, resnet, foldable, residual block, skip connection, residual connection, "
    "resblock, resnet block, residual path, residual sum",
    "block": "block, every block, each block, all block, block output, after block, after every block, unet block, "
    "every unet block, each unet block, all unet block, after every unet block, after each unet block, blocks, every "
    "stage, after all block",
    "identity": "identity, identity mapping, identity init",
    "init": "initialization, initialize, init, initial weight, starting point, warm start, initial parameter, "
    "reinitialization, initial checkpoint, start, begin, starting weight, pretrained initialization, starting state, "
    "initial state, initial value, warm started, departure point, what experts start from, starting checkpoint, "
    "begin from, start from, initialised with, initialized with, seeded with, beginning weight, initialising",
    "pretrained": "pretrained, pretraining, pretrain, pretrained model, pretrained weight, pretrained checkpoint, "
    "base checkpoint, pretrained denoiser, pretrained network, original weight, base weight, pretrained parameter, "
    "original checkpoint, public checkpoint, pretrained unet",
    "scratch": "scratch, from scratch, random initialization, randomly initialized, random init, random weight, "
    "random starting point, reinitialized, training from scratch, kaiming, xavier, he initialization, gaussian init, "
    "from zero, random value, random number, fresh weight, untrained, cold start, from random, random parameter, "
    "randomly, blank, reinitialise, reinitialized at random, reinitialised at random, reset, randomly reinitialized, "
    "new random weight, random network, newly drawn weight, gaussian noise weight, blank network",
    "partly": "partly, partial, partially, half of layers, some layers, subset of layers, half layers, share of "
    "layers, some blocks, last layers, few layers, half of layer, half of the weight, half of block, portion of "
    "layer, fraction of layer, some of layer, of layer, of block, the rest, rest, remainder, remaining layer, other "
    "half, percent of layer, layers only, of parameter",
    "ema": "ema, exponential moving average, moving average, polyak, ema weight, weight ema, exponential average, "
    "polyak averaging, exponential moving averaging, running average, running mean, sliding average, shadow weight, "
    "averaged model weight, temporal averaging, weight smoothing, smoothed weight, average over training, averaging "
    "over training, averaging along training, stochastic weight averaging, moving averages",
    "decay": "decay, decay rate, rate, momentum, ema decay, smoothing",
    "lossweighting": "loss weighting, loss reweighting, reweighting, loss weight, timestep weighting, snr weighting, "
    "timestep loss weighting, weighting function, weighting scheme, weighting strategy, loss rescaling, reweight, "
    "weighting of loss, loss weighting strategy, loss reweight, weighted loss, timestep dependent weighting, "
    "weighted objective, objective weighting, importance weighting, loss scaling, timestep loss weight, loss "
    "balance, loss balancing, reweighted loss, weighting of timestep, timestep dependent loss weight, weight of "
    "timestep, per timestep loss weighting, per timestep loss, weight per timestep, weight each timestep, noise "
    "level weighting, timestep weight, timestep importance, per timestep weight, weight over timestep, loss weight "
    "over time, loss weight per timestep, weighting over t, weight over t, weighting per timestep, weight as "
    "function of timestep, loss coefficient per timestep, weight lambda t, timestep reweighting",
    "minsnr": "minsnr, minsnr gamma, min signal to noise, minimum snr, minsnr weighting",
    "ptwo": "ptwo, perception prioritized, perception prioritised, perceptual prioritized",
    "truncatedsnr": "truncated snr, truncate snr, clipped snr, snr truncation, clamped snr, max snr, truncation of "
    "snr, snr clipped from below",
    "snrplusone": "snrplusone, snr plus one, one plus snr",
    "constantweight": "constant weighting, no weighting, uniform weighting, simple loss, lsimple, unweighted, "
    "constant weight, flat weighting, flat weight, equal loss weight, uniform loss, equal weighting of all timestep, "
    "constant loss weight, every timestep equally, all timestep equally, timestep equally, weight of one, unit "
    "weight, weighting of one",
    "uncertainty": "uncertainty, uncertainty weighting, homoscedastic, homoscedastic uncertainty, ant uw, uw, "
    "kendall, uncertainty based weighting, uncertainty weighted, learned variance weighting, task uncertainty, "
    "learned uncertainty, aleatoric",
    "nash": "nash, nashmtl, nash mtl, nash bargaining, ant nash, ant nashmtl, bargaining",
    "multitask": "multitask, multitask learning, mtl, multitask weighting, ant, task weighting, multitask "
    "optimization, multi objective, multiobjective, task balancing, multi task balancing",
    "othermtl": "pcgrad, cagrad, mgda, gradnorm, gradient surgery, dynamic weight averaging, dwa, imtl, graddrop, "
    "gradient projection, conflict averse, rlw, famo, gradient normalization, projecting conflicting gradient",
    "lora": "lora, low rank adaptation, low rank adapter, low rank, lora adapter, lora module, lora layer, parameter "
    "efficient, peft, parameter efficient finetuning, adapter, adapter finetuning, adapter module, low rank "
    "finetuning, low rank update, low rank expert, lora expert, lora finetuning, lora weight, lora matrix, low rank "
    "matrix",
    "lorarank": "lora rank, rank of lora, adapter rank, rank of adapter, rank of low rank, lora dimension",
    "fullft": "full parameter finetuning, full parameter, all parameter finetuning, full model finetuning, full "
    "weight, full weight finetuning, finetuning all parameter, finetuning of all parameter, finetuning all weight, "
    "full rank, full rank finetuning",
    "textdropout": "text dropout, caption dropout, prompt dropout, condition dropout, conditioning dropout, dropping "
    "caption, dropping prompt, empty prompt, null prompt, unconditional dropout, cfg dropout, prompt drop, caption "
    "drop, label dropout, class dropout, dropped caption, empty caption, null text, null condition, caption dropping, "
    "prompt dropping, text drop, condition drop, dropping of caption, dropping of prompt, dropping text, dropped "
    "prompt, label drop, dropout of caption, dropout of text, dropout of prompt, dropout of condition, text condition "
    "dropout, classifier free guidance training, classifier free guidance dropout, training of classifier free "
    "guidance",
    "guidance": "guidance, classifier free guidance, classifier free guidance scale, guidance scale, cfg, cfg scale, "
    "guidance strength, guidance weight, cfg weight, guided sampling",
    "unguided": "unguided, without guidance, no guidance, without cfg, no cfg, guidance off",
    "lr": "learning rate, lr, step size, range learning rate, learn rate, learning speed, stepsize, step width, size "
    "of optimizer step, initial learning rate, peak learning rate, base learning rate",
    "schedule": "learning rate schedule, lr schedule, learning rate scheduler, lr scheduler, learning rate decay, lr "
    "decay, annealing, learning rate annealing, learning rate curve, lr curve, decay schedule, cosine annealing "
    "schedule, learning rate policy, learning rate course, learning rate over training, learning rate profile, "
    "schedule of learning rate",
    "cosine": "cosine, cosine annealing, cosine decay, cosine schedule",
    "linear": "linear, linear decay, linear schedule, linearly",
    "constant": "constant, fixed, constant schedule, constant learning rate, unchanging, held fixed, flat, held "
    "constant, kept constant, not decayed",
    "length": "training length, training step, training iteration, iteration, finetuning step, finetuning iteration, "
    "training duration, training budget, epoch, number of update, finetuning duration, finetuning budget, gradient "
    "step, optimization step, update step, number of updates, training time budget, compute budget, finetuning "
    "length, training epoch, iter, budget, longer training, shorter training, optimization iteration, number of "
    "step, training schedule length, training compute, finetuning schedule length, finetuning schedule, training "
    "time, duration, optimizer step, parameter update, gradient update, how long, train longer, finetune longer, "
    "training steps, total step, step per expert, iteration per expert, finetuning time, training horizon, number of "
    "optimizer step, number of gradient step, number of training step, schedule of step, finetuning compute, amount "
    "of finetuning, amount of training, training amount, optimization length, length of optimization, optimisation "
    "length",
    "batch": "batch size, batch, minibatch, minibatch size, image per step, sample per step, number of image per "
    "update, image per update, minibatches, mini batch, mini batch size",
    "sampler": "sampler, solver, sampling method, sampling algorithm, ode solver, sde solver, inference scheduler, "
    "noise scheduler, inference sampler, sampling scheduler, scheduler, reverse process solver, sampling scheme, "
    "numerical solver, inference sampling, generation sampler, denoising sampler, integrator, numerical integrator, "
    "ode integrator, sde integrator, sampling procedure, reverse sampler, inference algorithm, generation procedure, "
    "sampling routine, diffusion sampler, generation algorithm, ode sampler, reverse process integrator, numerical "
    "method, solver of the reverse process, reverse diffusion solver, image generation sampler, numerical "
    "integration",
    "samplingsteps": "sampling step, inference step, number of denoising steps, nfe, number of function evaluation, "
    "function evaluation, number of sampling step, generation step, reverse step, number of inference step, ddim "
    "step, sampler step, denoising iteration, number of diffusion steps, step of sampler, network evaluation, model "
    "evaluation, neural function evaluation, generation steps, sampling budget, step at test time, step at "
    "inference, number of network evaluation, denoising evaluation, solver step, steps used for sampling, step for "
    "sampling, step for generation, evaluation per image, inference iteration, sampling iteration, evaluation of "
    "network, generating step, steps per image, step per image, denoising step at inference, denoising step at "
    "sampling, number of solver step, integration step, discretization step of the sampler",
    "ddim": "ddim, denoising diffusion implicit",
    "ddpm": "ddpm, ddpm sampler, ancestral sampling, ddpm sampling",
    "dpmsolver": "dpmsolver, dpmsolverpp, dpm solver, dpmsolver multistep, dpmsolvermultistep",
    "singlestep": "singlestep, dpmsolversinglestep",
    "euler": "euler, euler discrete, euler method, eulerdiscrete, forward euler",
    "eulera": "euler ancestral, eulerancestral",
    "heun": "heun, heun method, heundiscrete, second order heun",
    "unipc": "unipc, uni pc",
    "pndm": "pndm, plms, pseudo numerical",
    "lms": "lms, linear multistep",
    "deis": "deis",
    "kdpm": "kdpm",
    "eta": "eta",
    "antithetic": "antithetic, mirrored, antithetic sampling, mirrored pair, antithetic timestep, variance reduction, "
    "mirror image, mirror, mirrored timestep, paired timestep, symmetric pair",
    "perbatch": "per batch, shared by whole minibatch, shared by whole batch, shared by minibatch, shared across "
    "batch, common to batch, batch level, batch wise, each batch, whole batch, batchwise, once per batch, for each "
    "batch, for whole batch, every batch, once for whole batch, per minibatch, same for whole batch, shared by the "
    "batch",
    "persample": "per sample, independent per sample, independently per sample, independently for each sample, sample "
    "level, sample wise, each sample, samplewise, each image, per image, for each sample, individual sample, every "
    "sample, each example, per example, individually per sample",
    "gamma": "gamma",
    "sum": "sum, summation, summing, add up, adding up, addition of, plain addition, simple addition, vector "
    "addition, superposition, plain sum",
    "wsymbol": "wsymbol, wsymbols",
    "warmup": "warmup, warm up, learning rate warmup, lr warmup, warmup step, warmup phase, warmup iteration, warm up "
    "step, linear warmup",
    "given": "given, manual, manually, handpicked, hand picked, hand set, preset, by hand, hand tuned, prescribed, "
    "hand crafted, handcrafted, given by hand, fixed by hand, hand chosen, explicit, explicitly given",
}

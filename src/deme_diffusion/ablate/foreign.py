"""What plans ask for and no setting of this method is: recognised, so that it is never taken for something else."""

from deme_diffusion.ablate.rows import Foreign

FOREIGN = (
    Foreign(
        "architecture",
        ("unet", "unet layers", "layers of the unet"),
        "the network is the pretrained model's; finetuning and merging keep its architecture",
        ("channel-wise projection", "initialisation"),
    ),
    Foreign(
        "adapters",
        ("controlnet", "prompt tuning"),
        "of adapters there is LoRA",
        ("LoRA", "channel-wise projection"),
    ),
    Foreign(
        "data",
        ("data", "training data", "number of training data"),
        "the images are the recipe's; another data set is another recipe (data.source, data.path)",
        ("training length",),
    ),
    Foreign(
        "text conditioning",
        ("text encoder", "text encoder finetuning"),
        "text encoders and captions are the pretrained model's and the data's; only the denoiser is finetuned",
        ("text dropout", "guidance scale"),
    ),
    Foreign(
        "other guidance",
        ("classifier guidance", "negative prompt"),
        "of guidance there is the scale of the classifier-free one",
        ("guidance scale",),
    ),
    Foreign(
        "caching",
        ("caching", "caching in training"),
        "latents and embeddings kept in a cache are those that would be made anew at each step: the model is the same",
        (),
    ),
    Foreign(
        "seeds",
        ("seed", "seed results", "number of seeds"),
        "seeds are of the whole experiment, alike for all arms; set seeds in the recipe",
        (),
    ),
    Foreign(
        "measured images",
        ("number of evaluation images",),
        "all arms are measured on as many images, or FD could not be compared; set evaluate.num_images in the recipe",
        (),
    ),
    Foreign(
        "latent space",
        ("latent",),
        "whether pixels or an autoencoder's latents are denoised is the pretrained model's, and the autoencoder stays",
        (),
    ),
    Foreign(
        "noise schedule",
        ("noise schedule", "number of timesteps", "linear noise schedule", "cosine noise schedule"),
        "the noise schedule is the pretrained model's and stays",
        ("division", "loss weighting"),
    ),
    Foreign(
        "prediction type",
        ("prediction",),
        "what the network predicts is the pretrained model's and stays",
        ("loss weighting",),
    ),
    Foreign(
        "optimiser",
        ("optimizer", "optimizer training"),
        "the optimiser is AdamW; what can change is its learning rate",
        ("learning rate", "learning rate schedule", "batch size"),
    ),
    Foreign(
        "another loss",
        ("otherloss", "perceptual loss"),
        "the losses are the denoising and the consistency loss, both squared errors",
        ("consistency loss", "loss weighting"),
    ),
    Foreign(
        "order of training",
        ("curriculum", "curriculum training"),
        "experts are finetuned side by side, in no order",
        ("initialisation", "training length"),
    ),
    Foreign(
        "start of the projection",
        ("projection initialisation", "identity initialisation of projection", "identity start of projection"),
        "the projection starts at identity, so that the pretrained model's output is kept",
        ("channel-wise projection",),
    ),
    Foreign("compression", ("quantization", "sparsity"), "models are stored as they are", ("merge method",)),
    Foreign(
        "few-step models",
        ("consistency models", "consistency model distillation"),
        "models are finetuned, not distilled",
        ("sampler", "sampling steps"),
    ),
    Foreign(
        "base model",
        ("base model", "pretraining data"),
        "another pretrained model is another recipe (model.pretrained)",
        ("initialisation",),
    ),
    Foreign(
        "other multi-task methods",
        ("pcgrad", "pcgrad gradient", "pcgrad multi-task"),
        "of the multi-task methods there are uncertainty weighting and NashMTL",
        ("multi-task weighting", "division"),
    ),
    Foreign(
        "other merge methods",
        ("regmean", "regmean merge", "pruning merge", "pruning"),
        "it is none of the merge methods here",
        ("merge method", "merge weights"),
    ),
    Foreign(
        "other searches",
        ("random search", "random search of merge weights"),
        "it is none of the searches here",
        ("merge weights",),
    ),
)

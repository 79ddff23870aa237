"""Layout of Fovea Emoji: the one source for the loader, the trainers and the export. No imports, no side effects."""

IMAGE, LATENT, LATENT_CHANNELS = 256, 32, 4  # side in pixels, side of the latent, and its channels, as in SD1
DOWNSCALE = IMAGE // LATENT

# Scaled-linear betas; as in the other demo model, the end leaves no signal that would tell the brightness of flat images.
BETA_START, BETA_END, TIMESTEPS = 0.00085, 0.02, 1000

TEXT_WIDTH, TOKENS, TOKEN_COUNT = 256, 77, 49408
START_TOKEN, END_TOKEN = 49406, 49407
TEXT = {
    "num_hidden_layers": 3,
    "hidden_size": TEXT_WIDTH,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": TOKENS,
    "eos_token_id": END_TOKEN,
}

# What ComfyUI's detection reads from the weights, and what it cannot read.
UNET_DETECTED = {"in_channels": LATENT_CHANNELS, "model_channels": 96, "context_dim": TEXT_WIDTH}
UNET_DECLARED = {
    "num_heads": 4,
    "num_head_channels": -1,
    "num_res_blocks": [1, 1, 0],
    "channel_mult": [1, 2, 2],
    "transformer_depth": [0, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1],
    "transformer_depth_middle": 1,
}

UNET_PREFIX = "model.diffusion_model."
TEXT_PREFIX = "cond_stage_model.transformer.text_model."
VAE_PREFIX = "first_stage_model."
# Only the rows of the words the model knows are stored; the loader puts them into a zero table.
VOCABULARY_IDS, VOCABULARY_ROWS = "cond_stage_model.vocab_ids", "cond_stage_model.vocab_rows"

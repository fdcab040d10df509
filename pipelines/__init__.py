"""What generates pictures: it loads the models, reads prompts, draws, and previews."""

import logging

# transformers advises to install torchvision, which nothing here needs, when diffusers is imported: two long
# lines before the worker's own first sentence.
logging.getLogger("transformers.utils.import_utils").setLevel(logging.ERROR)

# It advises to install what would make 4-bit products on a CPU faster.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# Its encoders log what they cut off a long prompt, and a prompt reaches no log.
logging.getLogger("diffusers.pipelines").setLevel(logging.ERROR)

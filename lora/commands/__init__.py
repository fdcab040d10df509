"""The commands of `lora`: each module has the arguments, the work and the output of one."""

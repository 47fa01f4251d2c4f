/* SPDX-License-Identifier: GPL-2.0 OR MIT */
/* The core image, as the build put it beside the sources. */
#include <linux/linkage.h>

	.section .rodata, "a"
	.balign	4096
	.globl	blanket_image
blanket_image:
	.incbin	"blanket-core.bin"
	.globl	blanket_image_end
blanket_image_end:

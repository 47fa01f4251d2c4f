/* Writes every CPUID leaf that matters to QEMU's debug console, one line each:
 * leaf subleaf eax ebx ecx edx, in hexadecimal. XCR0 is set to all that the CPU
 * has of 0xe7 first, as in a guest. The dumps beside this file were made with
 *
 *   gcc -m32 -nostdlib -static -Wl,-Ttext=0x100000 -Wl,--build-id=none -o dump dump.S
 *   for m in EPYC,-svm Skylake-Server,-vmx Nehalem Haswell-noTSX max,la57=on; do
 *     qemu-system-x86_64 -accel tcg -cpu $m -kernel dump -display none \
 *       -debugcon file:${m%%,*}.txt -device isa-debug-exit,iobase=0xf4
 *   done
 */
	.section .text
	.globl _start
	.align 4
	.long 0x1badb002, 0, -0x1badb002
_start:
	mov $stack_top, %esp
	mov $1, %eax
	xor %ecx, %ecx
	cpuid
	test $(1 << 26), %ecx
	jz 1f
	mov %cr4, %eax
	or $((1 << 18) | (1 << 9)), %eax
	mov %eax, %cr4
	mov $0xd, %eax
	xor %ecx, %ecx
	cpuid
	and $0xe7, %eax
	xor %edx, %edx
	xor %ecx, %ecx
	xsetbv
1:	mov $ranges, %esi
2:	mov (%esi), %edi		/* first leaf */
3:	xor %ebp, %ebp			/* subleaf */
4:	mov %edi, %eax
	call hex
	mov %ebp, %eax
	call hex
	mov %edi, %eax
	mov %ebp, %ecx
	cpuid
	push %edx
	push %ecx
	push %ebx
	call hex
	pop %eax
	call hex
	pop %eax
	call hex
	pop %eax
	call hex
	mov $'\n', %al
	out %al, $0xe9
	inc %ebp
	cmp 8(%esi), %ebp
	jb 4b
	inc %edi
	cmp 4(%esi), %edi
	jbe 3b
	add $12, %esi
	cmpl $0, 8(%esi)
	jne 2b
	mov $0, %al
	out %al, $0xf4
5:	hlt
	jmp 5b
/* eax as eight digits and a space */
hex:	mov $8, %ecx
6:	rol $4, %eax
	mov %eax, %edx
	and $15, %edx
	movzbl digits(%edx), %edx
	xchg %eax, %edx
	out %al, $0xe9
	xchg %eax, %edx
	loop 6b
	mov $' ', %al
	out %al, $0xe9
	ret
digits:	.ascii "0123456789abcdef"
	.align 4
/* first leaf, last leaf, subleaves */
ranges:	.long 0, 3, 1
	.long 4, 4, 5
	.long 5, 6, 1
	.long 7, 7, 3
	.long 8, 0xa, 1
	.long 0xb, 0xb, 2
	.long 0xd, 0xd, 10
	.long 0xe, 0x1f, 1
	.long 0x40000000, 0x40000006, 1
	.long 0x40000100, 0x40000101, 1
	.long 0x80000000, 0x8000001c, 1
	.long 0x8000001d, 0x8000001d, 5
	.long 0x8000001e, 0x80000022, 1
	.long 0, 0, 0
	.bss
	.align 16
	.skip 4096
stack_top:

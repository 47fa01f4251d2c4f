# A freestanding i386 program, and snippets for compatibility mode.
#
# compat.rs puts an ELF header before the bytes between c32_start and c32_end
# and runs them as a 32-bit process loaded at C32_BASE. The first argument's
# first letter picks a test; exit code 0 is success, 77 "not offered here",
# anything else names the step that failed.
#
# AT&T syntax: symbol differences are plain constants there.

.set C32_BASE, 0x08048054
.macro ADDR label, reg
    movl $(\label - c32_start + C32_BASE), \reg
.endm

.pushsection .rodata.compat32, "a"
.code32
.globl c32_start, c32_end
c32_start:
    movl 8(%esp), %eax              # argv[1]
    movb (%eax), %al
    cmpb $'w', %al
    je t_write
    cmpb $'v', %al
    je t_vdso
    cmpb $'t', %al
    je t_tls
    cmpb $'s', %al
    je t_signal
    cmpb $'o', %al
    je t_old_signal
    cmpb $'f', %al
    je t_faults
    cmpb $'k', %al
    je t_fork
    cmpb $'l', %al
    je t_long_mode
    cmpb $'m', %al
    je t_mmap
    cmpb $'x', %al
    je t_x87
    cmpb $'d', %al
    je t_ldt
    cmpb $'e', %al
    je t_exit
    movl $99, %ebx
c32_exit:                           # exit(ebx)
    movl $1, %eax
    int $0x80
    hlt
c32_ok:
    xorl %ebx, %ebx
    jmp c32_exit

t_exit:
    movl $5, %ebx
    jmp c32_exit

t_write:
    movl $4, %eax
    movl $1, %ebx
    ADDR hello, %ecx
    movl $(hello_end - hello), %edx
    int $0x80
    movl $42, %ebx
    jmp c32_exit

# the vDSO's __kernel_vsyscall (AT_SYSINFO): getpid, then mmap2 with six arguments
t_vdso:
    movl (%esp), %ecx
    leal 8(%esp,%ecx,4), %esi       # envp
1:  lodsl
    testl %eax, %eax
    jnz 1b
2:  lodsl                           # auxv type
    movl %eax, %ecx
    lodsl                           # auxv value
    testl %ecx, %ecx
    jz no_sysinfo
    cmpl $32, %ecx
    jne 2b
    movl %eax, %edi
    movl $20, %eax
    int $0x80
    movl %eax, %ebp
    movl $1000, %esi
3:  movl $20, %eax
    call *%edi
    movl $1, %ebx
    cmpl %eax, %ebp
    jne c32_exit
    decl %esi
    jnz 3b
    movl %edi, scratch - c32_start + C32_BASE
    movl $192, %eax                 # mmap2(0, 4096, RW, PRIVATE|ANON, -1, 0)
    xorl %ebx, %ebx
    movl $4096, %ecx
    movl $3, %edx
    movl $0x22, %esi
    movl $-1, %edi
    xorl %ebp, %ebp
    call *(scratch - c32_start + C32_BASE)
    movl $2, %ebx
    cmpl $0xfffff000, %eax
    ja c32_exit
    movl $0x5a5a5a5a, (%eax)
    movl $3, %ebx
    testl %ebp, %ebp                # ebp must survive the call
    jnz c32_exit
    jmp c32_ok
no_sysinfo:
    movl $77, %ebx
    jmp c32_exit

# set_thread_area, read through %gs, across fork and 200 yields on both sides
t_tls:
    ADDR user_desc, %ebx
    movl $-1, (%ebx)
    ADDR tls_data, %eax
    movl %eax, 4(%ebx)
    movl $0xfffff, 8(%ebx)
    movl $0x51, 12(%ebx)            # seg_32bit | limit_in_pages | useable
    movl $243, %eax
    int $0x80
    movl $1, %ebx
    testl %eax, %eax
    jnz c32_exit
    movl user_desc - c32_start + C32_BASE, %eax
    leal 3(,%eax,8), %eax
    movw %ax, %gs
    movl $2, %eax                   # fork
    int $0x80
    movl %eax, %ebp
    testl %eax, %eax
    jnz 1f
    movl $0x0badcafe, %gs:4         # the child's own copy of the page
1:  movl $200, %edi
2:  movl $158, %eax                 # sched_yield
    int $0x80
    movl $2, %ebx
    cmpl $0x600dcafe, %gs:0
    jne c32_exit
    decl %edi
    jnz 2b
    testl %ebp, %ebp
    jnz 3f
    movl $3, %ebx
    cmpl $0x0badcafe, %gs:4
    jne c32_exit
    jmp c32_ok
3:  movl $4, %ebx
    cmpl $0, %gs:4
    jne c32_exit
    jmp wait_child

# waitpid(ebp): exits 0 when the child did
wait_child:
    movl $7, %eax
    movl %ebp, %ebx
    ADDR scratch, %ecx
    xorl %edx, %edx
    int $0x80
    movl $50, %ebx
    cmpl %ebp, %eax
    jne c32_exit
    movl $51, %ebx
    cmpl $0, scratch - c32_start + C32_BASE
    jne c32_exit
    jmp c32_ok

t_signal:                           # rt_sigaction with SA_SIGINFO
    ADDR sa_info, %ecx
    call install_usr1
    movl $500, %esi
    jmp kill_loop
t_old_signal:                       # the same with the old frame
    ADDR sa_plain, %ecx
    call install_usr1
    movl $500, %esi
kill_loop:
    movl $20, %eax
    int $0x80
    movl %eax, %ebx
    movl $37, %eax                  # kill(getpid(), SIGUSR1)
    movl $10, %ecx
    movl $0x13579bdf, %edi
    movl $0x2468ace0, %ebp
    int $0x80
    movl $2, %ebx
    cmpl $0x13579bdf, %edi
    jne c32_exit
    cmpl $0x2468ace0, %ebp
    jne c32_exit
    decl %esi
    jnz kill_loop
    movl $3, %ebx
    cmpl $500, counter - c32_start + C32_BASE
    jne c32_exit
    jmp c32_ok
install_usr1:                       # ecx = sigaction
    movl $174, %eax
    movl $10, %ebx
    xorl %edx, %edx
    movl $8, %esi
    int $0x80
    movl $1, %ebx
    testl %eax, %eax
    jnz c32_exit
    ret

handler_info:
    movl $5, %ebx
    cmpl $10, 4(%esp)
    jne c32_exit
    movl 8(%esp), %eax
    movl $6, %ebx
    cmpl $10, (%eax)                # siginfo.si_signo
    jne c32_exit
handler_plain:
    incl counter - c32_start + C32_BASE
    xorl %edi, %edi                 # sigreturn must bring these back
    xorl %ebp, %ebp
    ret
restore_rt:
    movl $173, %eax
    int $0x80
restore_old:
    popl %eax
    movl $119, %eax
    int $0x80

# SIGSEGV, SIGFPE, SIGILL, SIGTRAP, privileged instructions, kernel addresses
t_faults:
    movl $11, %ebx
    call install_fault
    movl $8, %ebx
    call install_fault
    movl $4, %ebx
    call install_fault
    movl $5, %ebx
    call install_fault
    movl $7, %ebx
    call install_fault

.macro FAULT number, want_signal, want_trap
    ADDR fault_after_\number, %eax
    movl %eax, resume - c32_start + C32_BASE
    movl $0, got_signal - c32_start + C32_BASE
    movl $(60 + \number), scratch - c32_start + C32_BASE
    jmp fault_do_\number
fault_after_\number:
    movl $(60 + \number), %ebx
    cmpl $\want_signal, got_signal - c32_start + C32_BASE
    jne c32_exit
    cmpl $\want_trap, got_trap - c32_start + C32_BASE
    jne c32_exit
.endm
    FAULT 0, 11, 14
    movl $80, %ebx
    cmpl $0x2004, got_addr - c32_start + C32_BASE
    jne c32_exit
    FAULT 1, 8, 0
    FAULT 2, 4, 6
    FAULT 3, 5, 3
    FAULT 4, 11, 13
    FAULT 5, 11, 13
    FAULT 6, 11, 13
    FAULT 7, 11, 4
    FAULT 8, 11, 14
    FAULT 9, 11, 13
    jmp c32_ok
fault_do_0:
    movl $1, 0x2004
    jmp fault_missed
fault_do_1:
    xorl %edx, %edx
    movl $1, %eax
    xorl %ecx, %ecx
    divl %ecx
    jmp fault_missed
fault_do_2:
    ud2
    jmp fault_missed
fault_do_3:
    int3
    jmp fault_missed
fault_do_4:
    cli
    jmp fault_missed
fault_do_5:
    hlt
    jmp fault_missed
fault_do_6:
    inb $0x80, %al
    jmp fault_missed
fault_do_7:
    movb $0x7f, %al                 # overflow trap: sets OF, then INTO
    addb $1, %al
    .byte 0xce
    jmp fault_missed
fault_do_8:
    movl 0xffffe000, %eax           # past the end of a compat process
    jmp fault_missed
fault_do_9:
    int $0x82                       # Xen's hypercall vector for 32-bit guests
fault_missed:
    movl scratch - c32_start + C32_BASE, %ebx
    addl $20, %ebx
    jmp c32_exit

install_fault:                      # ebx = signal
    ADDR sa_fault, %ecx
    movl $174, %eax
    xorl %edx, %edx
    movl $8, %esi
    int $0x80
    testl %eax, %eax
    movl $1, %ebx
    jnz c32_exit
    ret

handler_fault:                      # ucontext: gregs at 20; trapno 12, eip 14
    movl 4(%esp), %eax
    movl %eax, got_signal - c32_start + C32_BASE
    movl 8(%esp), %eax
    movl 12(%eax), %eax             # si_addr
    movl %eax, got_addr - c32_start + C32_BASE
    movl 12(%esp), %ecx
    movl 68(%ecx), %eax
    movl %eax, got_trap - c32_start + C32_BASE
    movl resume - c32_start + C32_BASE, %eax
    movl %eax, 76(%ecx)
    ret

t_fork:                             # 50 children, each status checked
    movl $50, %edi
1:  movl $2, %eax
    int $0x80
    testl %eax, %eax
    movl $7, %ebx
    jz c32_exit
    movl %eax, %ebx
    movl $7, %eax
    ADDR scratch, %ecx
    xorl %edx, %edx
    int $0x80
    movl $1, %ebx
    cmpl $0x700, scratch - c32_start + C32_BASE
    jne c32_exit
    decl %edi
    jnz 1b
    jmp c32_ok

# from 32-bit to 64-bit mode and back, 1000 times
t_long_mode:
    movl $1000, %edi
1:  ljmp $0x33, $(long_mode - c32_start + C32_BASE)
back32:
    movl $1, %ebx
    cmpl $0x55667788, %eax
    jne c32_exit
    cmpl $0x11223344, %edx
    jne c32_exit
    decl %edi
    jnz 1b
    jmp c32_ok
.code64
long_mode:
    movabsq $0x1122334455667788, %r8
    pushq %r8
    popq %rax
    movq %rax, %rdx
    shrq $32, %rdx
    pushq $0x23
    pushq $(back32 - c32_start + C32_BASE)
    lretq
.code32

t_mmap:                             # 500 x mmap2, touch, munmap
    movl $500, scratch - c32_start + C32_BASE
1:  movl $192, %eax
    xorl %ebx, %ebx
    movl $65536, %ecx
    movl $3, %edx
    movl $0x22, %esi
    movl $-1, %edi
    xorl %ebp, %ebp
    int $0x80
    movl $1, %ebx
    cmpl $0xfffff000, %eax
    ja c32_exit
    movl $2, %ebx
    cmpl $0, 61440(%eax)
    jne c32_exit
    movl %eax, (%eax)
    movl %eax, 61440(%eax)
    movl %eax, %ebx
    movl $91, %eax
    movl $65536, %ecx
    int $0x80
    movl $3, %ebx
    testl %eax, %eax
    jnz c32_exit
    decl scratch - c32_start + C32_BASE
    jnz 1b
    jmp c32_ok

t_x87:                              # x87 and SSE state over 200 yields
    fninit
    fldpi
    fld1
    movl $0x12345678, %eax
    movd %eax, %xmm3
    movl $200, %edi
1:  movl $158, %eax
    int $0x80
    decl %edi
    jnz 1b
    movd %xmm3, %eax
    movl $1, %ebx
    cmpl $0x12345678, %eax
    jne c32_exit
    fistpl scratch - c32_start + C32_BASE
    movl $2, %ebx
    cmpl $1, scratch - c32_start + C32_BASE
    jne c32_exit
    fistpl scratch - c32_start + C32_BASE
    movl $3, %ebx
    cmpl $3, scratch - c32_start + C32_BASE
    jne c32_exit
    jmp c32_ok

t_ldt:                              # modify_ldt entry 2, read through %fs
    ADDR user_desc, %ecx
    movl $2, (%ecx)
    ADDR tls_data, %eax
    movl %eax, 4(%ecx)
    movl $7, 8(%ecx)                # limit: 8 bytes
    movl $0x41, 12(%ecx)            # seg_32bit | useable
    movl $123, %eax
    movl $0x11, %ebx
    movl $16, %edx
    int $0x80
    movl $1, %ebx
    testl %eax, %eax
    jnz c32_exit
    movl $0x17, %eax                # index 2, LDT, RPL 3
    movw %ax, %fs
    movl $2, %ebx
    cmpl $0x600dcafe, %fs:0
    jne c32_exit
    jmp c32_ok

.balign 16
hello:
    .ascii "hello from 32 bits\n"
hello_end:
.balign 8
user_desc:
    .long 0, 0, 0, 0
tls_data:
    .long 0x600dcafe, 0, 0, 0
scratch:
    .long 0
counter:
    .long 0
resume:
    .long 0
got_signal:
    .long 0
got_trap:
    .long 0
got_addr:
    .long 0
sa_info:                            # handler, flags, restorer, mask
    .long handler_info - c32_start + C32_BASE, 0x04000004
    .long restore_rt - c32_start + C32_BASE, 0, 0
sa_plain:
    .long handler_plain - c32_start + C32_BASE, 0x04000000
    .long restore_old - c32_start + C32_BASE, 0, 0
sa_fault:
    .long handler_fault - c32_start + C32_BASE, 0x44000004
    .long restore_rt - c32_start + C32_BASE, 0, 0
c32_end:

.globl compat_visit_start, compat_visit_end
compat_visit_start:
.code64
    # rdi: code selector, rsi: top of a stack below 4 GiB. Returns the value
    # that the 32-bit part makes: the low half of the process id, by int 0x80.
    pushq %rbx
    pushq %rbp
    movq %rsp, %rbp
    leaq 1f(%rip), %rax
    leaq 2f(%rip), %rdx
    movq %rsi, %rsp
    pushq %rbp
    pushq %rdi
    pushq %rax
    movl $0x2b, %ecx
    movl %ecx, %ds
    movl %ecx, %es
    lretq
.code32
1:  movl %edx, %esi
    movl $20, %eax
    int $0x80
    incl %eax                       # inc eax is a REX prefix in 64-bit mode
    decl %eax
    pushl $0x33
    pushl %esi
    lret
.code64
2:  popq %rsp
    popq %rbp
    popq %rbx
    xorl %ecx, %ecx
    movl %ecx, %ds
    movl %ecx, %es
    movl %eax, %eax
    retq
compat_visit_end:
.popsection
.code64

/* SPDX-License-Identifier: GPL-2.0-or-later */
/*
 * The tiny guest's boot sector: load the rest of the guest behind itself,
 * switch to flat 32-bit protected mode, call guest_main().
 */
#define SECTORS 48              /* what follows; must not cross 64 KiB */

        .code16
        .section .text.boot
        .globl  _start
_start: cli
        xorw    %ax, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movw    $0x7c00, %sp
        sti
        movw    $0x0200 + SECTORS, %ax  /* BIOS: read sectors */
        movw    $0x7e00, %bx            /* to here */
        movw    $0x0002, %cx            /* from cylinder 0, sector 2 */
        movw    $0x0080, %dx            /* of head 0, first disk */
        int     $0x13
        cli
        inb     $0x92, %al              /* address line 20 on */
        orb     $2, %al
        andb    $0xfe, %al
        outb    %al, $0x92
        lgdtl   gdtr
        movl    %cr0, %eax
        orl     $1, %eax
        movl    %eax, %cr0
        ljmpl   $8, $flat

        .code32
flat:   movw    $16, %ax
        movw    %ax, %ds
        movw    %ax, %es
        movw    %ax, %ss
        movl    $0x7c00, %esp
        call    guest_main
hang:   hlt
        jmp     hang

        .balign 8
gdt:    .quad   0
        .quad   0x00cf9a000000ffff      /* 8: code, 4 GiB */
        .quad   0x00cf92000000ffff      /* 16: data, 4 GiB */
gdtr:   .word   23
        .long   gdt

        .org    510
        .word   0xaa55

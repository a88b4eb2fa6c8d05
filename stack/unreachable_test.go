package stack

import (
	"fmt"
	"io"
	"os"
	"syscall"
	"testing"
)

func TestUnreachable(t *testing.T) {
	type answer struct {
		typ, code uint8
		ok        bool
	}
	silent := answer{}
	for _, c := range []struct {
		err    error
		v4, v6 answer
	}{
		{syscall.ECONNREFUSED, answer{3, 3, true}, answer{1, 4, true}},
		{syscall.EHOSTUNREACH, answer{3, 1, true}, answer{1, 3, true}},
		{syscall.EHOSTDOWN, answer{3, 1, true}, answer{1, 3, true}},
		{syscall.ENETUNREACH, answer{3, 0, true}, answer{1, 0, true}},
		{syscall.ENETDOWN, answer{3, 0, true}, answer{1, 0, true}},
		{syscall.ENODEV, answer{3, 0, true}, answer{1, 0, true}},
		{syscall.EADDRNOTAVAIL, answer{3, 0, true}, answer{1, 0, true}},
		{syscall.EAFNOSUPPORT, answer{3, 0, true}, answer{1, 0, true}},
		{syscall.EACCES, answer{3, 13, true}, answer{1, 1, true}},
		{syscall.EPERM, answer{3, 13, true}, answer{1, 1, true}},
		{syscall.EMSGSIZE, answer{3, 4, true}, answer{2, 0, true}},
		{syscall.ETIMEDOUT, silent, silent},
		{syscall.EAGAIN, silent, silent},
		{io.EOF, silent, silent},
		{nil, silent, silent},
		{fmt.Errorf("dial: %w", os.NewSyscallError("connect", syscall.ECONNREFUSED)), answer{3, 3, true}, answer{1, 4, true}},
	} {
		for _, v6 := range []bool{false, true} {
			want := c.v4
			if v6 {
				want = c.v6
			}
			var got answer
			if got.typ, got.code, got.ok = Unreachable(v6, c.err); got != want {
				t.Errorf("Unreachable(%v, %v) = %v, want %v", v6, c.err, got, want)
			}
		}
	}
}

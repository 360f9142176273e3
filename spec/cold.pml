/* The cold move of one running VM (spec/handover.md), for spin: NVA, old NVE, new NVE and a peer,
 * with lost messages, repeated orders, crashes of any daemon and an abort at any moment.
 *
 *   spin -a cold.pml && gcc -O2 -DSAFETY -o pan pan.c && ./pan -m100000
 *
 * As in handover.pml frames and time are left out, what is written outlives a crash, an order that
 * is overwritten before it is read is a lost one, and each change of phase is one `enter(FROM, TO)`.
 * A state is the instant of the VM at which it was saved: how often it had begun to run.
 */

#ifndef LOSSES
#define LOSSES 2
#endif
#ifndef CRASHES
#define CRASHES 2
#endif

#define OLD 0
#define NEW 1
#define PEER 2
#define ALL 3
#define NO_STATE 0

mtype:Phase = { planned, staged, paused, equal, committed, converging, drained, closed, aborting,
                aborted };
mtype:Copy = { none, runs, stopped };
mtype:Word = { nothing, associate, suspend, give, wake, drop_state, go_back, drop_copy, count,
               prepared, stands, received, woken, given_back, restored, is_closed, failed,
               drops_too, drops_all, leads_here, is_back };

mtype:Phase phase = planned;      /* the NVA's record, and all that it journals */
byte home = OLD;
bool has_marked[ALL], is_active[ALL], has_closed[ALL];
bool is_stopped, is_listening, is_woken, is_given_back, is_restored, is_closing;

mtype:Copy copy[ALL];             /* QEMU's process on each host */
byte instant = 1;                 /* of the VM */
byte saved[ALL] = NO_STATE;       /* the VM's state on each disk */
byte taken = NO_STATE;            /* the state that was taken for the move, at the new host */
bool taking;                      /* somebody listens there; goes with the daemon */
bool drops[ALL];                  /* each kernel: the address is in transit */

mtype:Word order[ALL];
bool pushed[ALL];                 /* the NVE has still to hear what the record means */
chan up = [3] of { mtype:Word, byte };
byte losses, crashes;

#define enter(FROM, TO) assert(phase == FROM); phase = TO
#define tell(N, WORD)   order[N] = WORD
/* What stands on a push that was sent before waits until the kernel has that (HO-22). */
#define turn(N, WORD)   (!pushed[N] && order[N] == WORD)
#define push()          pushed[OLD] = true; pushed[NEW] = true; pushed[PEER] = true
#define say(WORD, N)    if :: nfull(up) -> up!WORD, N :: full(up) -> skip fi
#define forget()        said = nothing; nve = 0 /* fewer states: nobody looks at them again */
#define every(WHAT)     WHAT[OLD] && WHAT[NEW] && WHAT[PEER]
#define before_commit   (phase == planned || phase == staged || phase == paused)
#define was_paused      (phase == paused || phase == equal || phase == committed)
#ifdef BUG_STOP_EARLY
#define others_drop     has_marked[NEW]
#else
#define others_drop     (has_marked[NEW] && has_marked[PEER])
#endif
#define safe()          assert(!(copy[OLD] == runs && copy[NEW] == runs)); \
                        assert(copy[OLD] != runs || home == OLD); \
                        assert(copy[NEW] != runs || home == NEW)

inline runs_on(n, state) {
  assert(state == instant); /* not from an older one: time would go back */
  copy[n] = runs;
  instant++;
  safe()
}

/* What the present phase waits for is asked (again). */
inline ask() {
  if
  :: phase == planned -> tell(NEW, associate)
  :: phase == equal -> skip
  :: phase == staged || phase == paused ->
     if :: !is_listening -> tell(NEW, associate) :: else fi;
     if
     :: phase == paused && has_marked[OLD] && !is_stopped -> tell(OLD, suspend)
     :: phase == paused && is_stopped && is_listening -> tell(OLD, give)
     :: else
     fi
  :: phase == committed -> tell(NEW, wake)
  :: phase == converging -> skip
  :: phase == aborting && !is_closing ->
     if :: !is_restored -> tell(OLD, go_back) :: else fi;
     if :: !is_given_back -> tell(NEW, drop_copy) :: else fi
  :: phase == drained || (phase == aborting && is_closing) ->
     if
     :: !has_closed[OLD] && phase == drained -> tell(OLD, drop_state)
     :: !has_closed[OLD] && phase == aborting -> tell(OLD, count)
     :: else
     fi;
     if :: !has_closed[NEW] -> tell(NEW, count) :: else fi;
     if :: !has_closed[PEER] -> tell(PEER, count) :: else fi
  fi
}

/* From what is known to the next phase; passed through as far as it goes. */
inline advance() {
  if
  :: phase == staged && others_drop -> enter(staged, paused); push()
  :: else
  fi;
  if
  :: phase == equal -> enter(equal, committed); home = NEW; push() /* one compare-and-set */
  :: phase == equal -> enter(equal, aborting); push() /* which met another version */
  :: else
  fi;
  if :: phase == committed && is_woken -> enter(committed, converging); push() :: else fi;
  if :: phase == converging && every(is_active) -> enter(converging, drained) :: else fi;
  if :: phase == drained && every(has_closed) -> enter(drained, closed) :: else fi;
  if
  :: phase == aborting && !is_closing && is_restored && is_given_back -> is_closing = true
  :: else
  fi;
  if
  :: phase == aborting && is_closing && every(has_closed) -> enter(aborting, aborted)
  :: else
  fi
}

inline turn_back() {
  if
  :: phase == planned -> enter(planned, aborting); push()
  :: phase == staged -> enter(staged, aborting); push()
  :: phase == paused -> enter(paused, aborting); push()
  :: else -> skip /* only forward, or on the way back already */
  fi
}

inline hear(word, nve) {
  if
  :: word == prepared ->
     if :: phase == planned || phase == staged || phase == paused -> is_listening = true :: else fi;
     if :: phase == planned -> enter(planned, staged); push() :: else fi
  :: word == drops_too -> if :: phase == staged && nve != OLD -> has_marked[nve] = true :: else fi
  :: word == drops_all ->
     if
     :: (phase == staged || phase == paused) -> has_marked[nve] = true
     :: else
     fi
  :: word == leads_here -> if :: phase == converging -> is_active[nve] = true :: else fi
  :: word == stands -> if :: phase == paused -> is_stopped = true :: else fi
  :: word == received ->
     if :: phase == paused && is_stopped && is_listening -> enter(paused, equal) :: else fi
  :: word == woken -> if :: phase == committed -> is_woken = true :: else fi
  :: word == given_back -> if :: phase == aborting -> is_given_back = true :: else fi
  :: word == restored ->
     if :: phase == aborting && !is_restored -> is_restored = true; push() :: else fi
  :: word == is_closed -> if :: is_closing || phase == drained -> has_closed[nve] = true :: else fi
  :: word == is_back -> pushed[nve] = true;
     if :: (phase == staged || phase == paused) && nve == NEW -> is_listening = false :: else fi
  :: word == failed -> turn_back()
  fi
}

active proctype nva() {
  mtype:Word said;
  byte nve;
  atomic { ask() };
  do
  :: atomic { (phase == closed || phase == aborted) -> break }
  :: atomic { up?said, nve ->
       hear(said, nve); advance();
       if :: phase != closed && phase != aborted -> ask() :: else fi;
       safe();
       forget()
     }
  :: atomic { losses < LOSSES && nempty(up) -> up?said, nve; losses++; forget() }
  :: atomic { before_commit -> turn_back(); ask() }
  :: atomic { crashes < CRASHES && phase != closed && phase != aborted -> /* NVA dies, is back */
       crashes++;
       do :: up?said, nve :: empty(up) -> break od;
       forget();
       turn_back(); push(); /* a cold move before the commit is turned back */
       ask()
     }
  :: atomic { timeout -> push(); ask() } /* a tick: nothing else can happen */
  od;
  atomic {
    safe();
    assert(taken == NO_STATE);
    assert(saved[OLD] == NO_STATE && saved[NEW] == NO_STATE);
    assert((!drops[OLD] || pushed[OLD]) && (!drops[NEW] || pushed[NEW]));
    assert(!drops[PEER] || pushed[PEER]);
    if
    :: phase == closed -> assert(copy[NEW] == runs && copy[OLD] == none)
    :: else -> assert(copy[OLD] == runs && copy[NEW] == none)
    fi
  }
}

/* A push brings the kernel to what the record means now, and is acknowledged. */
inline kernel(n) {
  pushed[n] = false;
  if
  :: was_paused || (phase == aborting && !is_restored && drops[n]) -> drops[n] = true;
     say(drops_all, n)
  :: phase == staged && n != OLD -> drops[n] = true; say(drops_too, n)
  :: else -> drops[n] = false;
     if :: home == NEW -> say(leads_here, n) :: else fi
  fi
}

/* A starting daemon: of a process and a state beside it one is the VM (HO-55). */
inline starts(n) {
  if
  :: copy[n] == runs -> saved[n] = NO_STATE
  :: copy[n] == stopped && saved[n] != NO_STATE -> copy[n] = none
  :: else
  fi;
  say(is_back, n)
}

active proctype old_nve() {
  copy[OLD] = runs;
end:
  do
  :: atomic { pushed[OLD] -> kernel(OLD) }
  :: atomic { turn(OLD, suspend) -> order[OLD] = nothing;
       if
       :: copy[OLD] == runs -> assert(every(drops)); copy[OLD] = stopped
       :: else
       fi
     };
     if
     :: atomic { copy[OLD] == stopped -> saved[OLD] = instant };
        if
        :: atomic { copy[OLD] = none; say(stands, OLD) }
        :: atomic { crashes < CRASHES -> crashes++; starts(OLD) }
        fi
     :: atomic { copy[OLD] == none && saved[OLD] != NO_STATE -> say(stands, OLD) }
     :: atomic { crashes < CRASHES -> crashes++; starts(OLD) }
     :: atomic { copy[OLD] != stopped && saved[OLD] == NO_STATE -> say(failed, OLD) }
     fi
  :: atomic { turn(OLD, give) -> order[OLD] = nothing;
       if
       :: taking && saved[OLD] != NO_STATE -> taken = saved[OLD]; taking = false; say(received, OLD)
       :: taken != NO_STATE -> say(received, OLD) /* it was given, and nobody heard of it */
       :: else -> say(failed, OLD)
       fi
     }
  :: atomic { turn(OLD, go_back) -> order[OLD] = nothing;
       if
       :: copy[OLD] == runs -> saved[OLD] = NO_STATE
       :: copy[OLD] == stopped -> runs_on(OLD, instant); saved[OLD] = NO_STATE
       :: copy[OLD] == none && saved[OLD] != NO_STATE -> runs_on(OLD, saved[OLD]);
          saved[OLD] = NO_STATE
       :: else
       fi;
       say(restored, OLD)
     }
  :: atomic { turn(OLD, drop_state) -> order[OLD] = nothing; saved[OLD] = NO_STATE;
       copy[OLD] = none; say(is_closed, OLD)
     }
  :: atomic { turn(OLD, count) -> order[OLD] = nothing; say(is_closed, OLD) }
  :: atomic { order[OLD] != nothing && losses < LOSSES -> losses++; order[OLD] = nothing }
  :: atomic { order[OLD] != nothing && crashes < CRASHES -> crashes++; order[OLD] = nothing;
       starts(OLD)
     }
  od
}

active proctype new_nve() {
  copy[NEW] = none;
end:
  do
  :: atomic { pushed[NEW] -> kernel(NEW) }
  :: atomic { turn(NEW, associate) -> order[NEW] = nothing; taking = true; say(prepared, NEW) }
  :: atomic { turn(NEW, wake) -> order[NEW] = nothing;
       taking = false; /* a state that is given twice comes to nobody */
#ifdef BUG_KEEP_BOTH
       saved[NEW] = taken;
#else
       if :: taken != NO_STATE -> saved[NEW] = taken; taken = NO_STATE :: else fi
#endif
     };
     if
     :: atomic { copy[NEW] == none && saved[NEW] != NO_STATE ->
          runs_on(NEW, saved[NEW])
        };
        if
        :: atomic { saved[NEW] = NO_STATE; say(woken, NEW) }
        :: atomic { crashes < CRASHES -> crashes++; starts(NEW) }
        fi
     :: atomic { copy[NEW] == runs -> saved[NEW] = NO_STATE; say(woken, NEW) }
     :: atomic { crashes < CRASHES -> crashes++; taking = false; starts(NEW) }
     fi
  :: atomic { turn(NEW, drop_copy) -> order[NEW] = nothing; taking = false; taken = NO_STATE;
       say(given_back, NEW)
     }
  :: atomic { turn(NEW, count) -> order[NEW] = nothing; say(is_closed, NEW) }
  :: atomic { order[NEW] != nothing && losses < LOSSES -> losses++; order[NEW] = nothing }
  :: atomic { (order[NEW] != nothing || taking) && crashes < CRASHES -> crashes++;
       order[NEW] = nothing; taking = false;
       starts(NEW)
     }
  od
}

active proctype peer_nve() {
end:
  do
  :: atomic { pushed[PEER] -> kernel(PEER) }
  :: atomic { turn(PEER, count) -> order[PEER] = nothing; say(is_closed, PEER) }
  :: atomic { order[PEER] != nothing && losses < LOSSES -> losses++; order[PEER] = nothing }
  od
}

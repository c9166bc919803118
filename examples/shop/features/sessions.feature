Feature: Sessions

  Scenario: The factory hands over a session that the shop made
    Given Ann has logged in
    Then Ann reads her name on the page of her orders
    And the session of her cookie is hers

  Scenario: Who logs out is out
    Given Ann has logged in
    When Ann logs out
    Then the answer is 303
    And the old cookie is worth nothing
    And Ann has 0 sessions

  Scenario: Two devices are two sessions
    Given Ann has logged in
    And Ann has logged in on a second device
    Then Ann has 2 sessions
    When Ann logs out
    Then the second device is still logged in

  Scenario Outline: A forged cookie is refused
    When a guest comes with the cookie "<forged>"
    Then the answer is 401

    Examples:
      | forged                                                           |
      | 0000000000000000000000000000000000000000000000000000000000000000 |
      | ' OR 1=1 --                                                      |
